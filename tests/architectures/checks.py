# SPDX-License-Identifier: Apache-2.0
"""Checks of one method on one model: identity, drop is mask, decode, batch, beams, text, no trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import vtprune
from tests.architectures.hiding import eager, hidden, mixes_without_mask, shortened
from tests.architectures.prompts import FIRST_TEXT, ONE, TWO, Features, Prompts, extended

RATIO, STEPS, TOLERANCE = 0.4, 5, 2e-4


class Failed(AssertionError):
    """A failed check; the message includes the deviation."""


class Subject:
    """A small model with its prompts and its unpruned logits."""

    def __init__(self, model: nn.Module, prompts: Prompts) -> None:
        self.model, self.prompts = model, prompts
        self.parts = vtprune.inspect(model)
        self.hybrid = any(map(mixes_without_mask, self.parts.layers))
        self.one = prompts.batch(ONE)
        self.plain = self.logits(self.one)
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0

    @torch.no_grad()
    def logits(self, batch: dict[str, Any], **extra: Any) -> Tensor:
        return _bounded(self.model(**fresh(batch), **extra).logits)

    @torch.no_grad()
    def beams(self, batch: dict[str, Any]) -> Tensor:
        """Tokens `[B, STEPS]` of the best of two beams."""
        mode = {"max_new_tokens": STEPS, "do_sample": False, "num_beams": 2, "suppress_tokens": list(range(64))}
        return self.model.generate(**fresh(batch), **mode)[:, -STEPS:]

    @torch.no_grad()
    def generate(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Greedy tokens `[B, STEPS]` without special tokens, and their logits `[B, STEPS, V]`."""
        out = self.model.generate(
            **fresh(batch),
            max_new_tokens=STEPS,
            do_sample=False,
            suppress_tokens=list(range(64)),
            output_logits=True,
            return_dict_in_generate=True,
        )
        return out.sequences[:, -STEPS:], _bounded(torch.stack(out.logits, 1))

    @contextmanager
    def reference(self, last: Any) -> Iterator[None]:
        """The unpatched model without the tokens that `last` reports as dropped; its logits are those of the surviving
        columns where the decoder runs on the shorter sequence."""
        cuts = [
            (layer, [v[~torch.isin(v, k)] for v, k in zip(last.visual, kept, strict=True)])
            for layer, kept in last.stages
        ]
        with eager(self.parts.decoder):
            if self.hybrid:
                layer, gone = cuts[-1]
                with shortened(self.parts.layers, layer, gone[0]):
                    yield
            else:
                with hidden(self.parts.layers, cuts):
                    yield


def fresh(batch: dict[str, Any]) -> dict[str, Any]:
    """Copies a batch's encoder outputs, which models and `generate` modify in place."""

    def own(value: Any) -> Any:
        if type(value) is dict:
            return {name: own(item) for name, item in value.items()}
        return Features(**value) if isinstance(value, Features) else value

    return {name: own(value) for name, value in batch.items()}


def _bounded(logits: Tensor) -> Tensor:
    """Logits as float32; values that the model masks out are bounded so that they do not set the scale."""
    return torch.where(logits.abs() < 1e30, logits, 0).float()


def _differ(got: Tensor, want: Tensor) -> float:
    """Largest absolute difference relative to the largest logit."""
    return float((got - want).abs().max() / want.abs().max())


def _close(got: Tensor, want: Tensor, what: str, plain: Tensor | None = None) -> None:
    """Raises unless `got` equals `want` and clearly differs from the unpruned `plain`."""
    off = _differ(got, want)
    if not off < TOLERANCE:
        raise Failed(f"{what}: off by {off:.1e} of the largest logit")
    if plain is not None and not _differ(got, plain) > 20 * max(off, 1e-6):
        raise Failed(f"{what}: pruning changed nothing, so the check says nothing")


def identity(subject: Subject, method: Any) -> None:
    """`ratio=1.0` gives bit-identical logits and the same generated tokens."""
    tokens, logits = subject.generate(subject.one)
    with vtprune.patch(subject.model, ratio=1.0, method=method):
        if not torch.equal(subject.logits(subject.one), subject.plain):
            raise Failed("identity: logits differ with ratio=1.0")
        same_tokens, same_logits = subject.generate(subject.one)
    if not (torch.equal(tokens, same_tokens) and torch.equal(logits, same_logits)):
        raise Failed("identity: generation differs with ratio=1.0")


def drop_is_mask(subject: Subject, method: Any) -> None:
    """Surviving columns have the logits of the unpatched model with the dropped columns masked."""
    with vtprune.patch(subject.model, ratio=RATIO, method=method) as patch:
        got, last = subject.logits(subject.one), patch.last
    survivors = _survivors(subject, last)
    with subject.reference(last):
        want = subject.logits(subject.one, use_cache=False)
    want = want[0] if subject.hybrid and want.shape[1] == len(survivors) else want[0, survivors]
    _close(got[0, survivors], want, "drop is mask", subject.plain[0, survivors])


def budget(subject: Subject, method: Any) -> None:
    """A plain call keeps the number of tokens that was asked for."""
    with vtprune.patch(subject.model, ratio=RATIO, method=method) as patch:
        subject.logits(subject.one)
    _survivors(subject, patch.last)


def _survivors(subject: Subject, last: Any) -> Tensor:
    if last is None:
        raise Failed("no token was pruned, and no error was raised")
    visual, kept = last.visual[0], last.kept[0]
    wanted = max(1, round(RATIO * len(visual)))
    if len(kept) != wanted:
        raise Failed(f"budget: {len(kept)} of {len(visual)} kept, {wanted} asked for")
    columns = torch.arange(subject.one["input_ids"].shape[1])
    return columns[~torch.isin(columns, visual) | torch.isin(columns, kept)]


def decode(subject: Subject, method: Any) -> None:
    """Logits of every generated token equal those of one pass of the masked, unpatched model over the whole text."""
    plain, plain_logits = subject.generate(subject.one)
    whole = subject.logits(extended(subject.one, plain[:, :-1]), use_cache=False)[:, -STEPS:]
    at_once = _differ(whole, plain_logits) < TOLERANCE
    if not at_once and subject.hybrid:
        raise OwnLimit("the model's own cached decoding differs from one pass over the text")
    with vtprune.patch(subject.model, ratio=RATIO, method=method) as patch:
        tokens, logits = subject.generate(subject.one)
        last = patch.last
    if last is None:
        raise Failed("decode: generate was not pruned, and no error was raised")
    with subject.reference(last):
        if at_once:
            want = subject.logits(extended(subject.one, tokens[:, :-1]), use_cache=False)[:, -STEPS:]
        else:  # prompt and generated text are attended to differently: generate with the masked model
            same, want = subject.generate(subject.one)
            if not torch.equal(same, tokens):
                raise Failed(f"decode: generated {tokens.tolist()}, the masked model {same.tolist()}")
    _close(logits, want, "decode", plain_logits)


def batch(subject: Subject, method: Any) -> None:
    """A sample in a left-padded batch has the same kept tokens and logits as alone."""
    _padded(subject, method, "left")


def right_padding(subject: Subject, method: Any) -> None:
    """A sample in a right-padded batch has the same kept tokens and logits as alone."""
    _padded(subject, method, "right")


def _padded(subject: Subject, method: Any, side: str) -> None:
    both, length = subject.prompts.batch(TWO, side), subject.one["input_ids"].shape[1]
    pad = both["input_ids"].shape[1] - length if side == "left" else 0
    mine = slice(pad, pad + length)
    off = _differ(subject.logits(both)[0, mine], subject.plain[0])
    if not off < TOLERANCE:
        raise OwnLimit(f"the model itself depends on padding (by {off:.1e})")
    with vtprune.patch(subject.model, ratio=RATIO, method=method) as patch:
        alone, kept = subject.logits(subject.one), patch.last.kept[0]
        together = subject.logits(both)
        if not torch.equal(patch.last.kept[0] - pad, kept):
            raise Failed(f"padded {side}: kept {(patch.last.kept[0] - pad).tolist()}, alone {kept.tolist()}")
    # Dropped columns are zero in both.
    _close(together[0, mine], alone[0], f"padded {side}")


def beams(subject: Subject, method: Any) -> None:
    """Beam search gives the same text as the masked, unpatched model."""
    if subject.hybrid:
        raise OwnLimit("layers without masks have no reference for beams")
    try:
        plain = subject.beams(subject.one)
    except Exception as error:  # the unpruned model cannot either
        raise OwnLimit(f"the model itself has no beam search ({type(error).__name__})") from error
    with vtprune.patch(subject.model, ratio=RATIO, method=method) as patch:
        got, last = subject.beams(subject.one), patch.last
    with subject.reference(last):
        want = subject.beams(subject.one)
    if not torch.equal(got, want):
        raise Failed(f"beams: {got.tolist()}, the masked model {want.tolist()}, unpruned {plain.tolist()}")


def text(subject: Subject, method: Any) -> None:
    """A prompt without pictures gives the unpatched model's logits."""
    ids = torch.arange(FIRST_TEXT, FIRST_TEXT + 9)[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs |= {name: torch.zeros_like(ids) for name in subject.prompts.wants}
    try:
        plain = subject.logits(inputs)
    except Exception as error:  # a model that requires a picture
        raise OwnLimit(f"the model itself takes no prompt without pictures ({type(error).__name__})") from error
    with vtprune.patch(subject.model, ratio=RATIO, method=method) as patch:
        if not torch.equal(subject.logits(inputs), plain) or patch.last is not None:
            raise Failed("text: a prompt without pictures was changed")


class OwnLimit(Exception):
    """The unpruned model lacks the property, so the check does not apply."""


def no_trace(subject: Subject, method: Any) -> None:
    """`remove` restores hooks, attributes, state and outputs."""
    before = _inventory(subject.model)
    patch = vtprune.patch(subject.model, ratio=RATIO, method=method)
    subject.logits(subject.one)
    patch.remove()
    if _inventory(subject.model) != before:
        raise Failed("no trace: hooks or attributes are left")
    if not torch.equal(subject.logits(subject.one), subject.plain):
        raise Failed("no trace: logits differ after remove")


def _inventory(model: nn.Module) -> list[Any]:
    modules = [
        (name, sorted(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()
    ]
    return [modules, sorted(model.state_dict())]


CHECKS: dict[str, Callable[[Subject, Any], None]] = {
    "identity": identity,
    "drop is mask": drop_is_mask,
    "decode": decode,
    "batch": batch,
    "right padding": right_padding,
    "beams": beams,
    "text": text,
    "no trace": no_trace,
}
CLIP_CHECKS = {name: CHECKS[name] for name in ("drop is mask", "decode", "batch")}
