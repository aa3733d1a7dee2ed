# SPDX-License-Identifier: Apache-2.0
"""Certification of the smallest ratio that changes few answers on your own pictures and questions."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..core import default_method
from ..core.certificate import Certificate
from ..core.energy import Auto
from ..core.method import Method
from ..core.registry import resolve
from ..engine.patching import patch, refuse_patched
from ..errors import CertificateError, NothingPrunedError
from ..models.identity import files_hash
from . import progress
from .given import batches_of, refuse_below_one
from .intervals import group_means
from .metrics import NO_PICTURES, refuse_nan
from .risk import exact_p_value, p_value, pictures_needed

# Every candidate is tested at the full level, so a finer sequence costs time but no statistical power.
CANDIDATES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1, 0.075, 0.05)


def certify(
    model: nn.Module,
    prompts: Iterable[Mapping[str, Any]],
    *,
    method: str | Method | type[Method] = default_method.NAME,
    risk: float = 0.05,
    confidence: float = 0.95,
    candidates: Sequence[float | Auto] = CANDIDATES,
    pictures: Sequence[Hashable] | None = None,
    max_new_tokens: int = 16,
    log: Callable[[str], None] = lambda line: None,
) -> Certificate:
    """Finds the smallest ratio at which few greedy answers differ from those of the unpruned model.

    With probability `confidence` over the draw of the pictures, the expected share of changed answers at the certified
    ratio is at most `risk`, for pictures and questions of the same kind. Several questions about one picture count as
    one observation. See `study.risk` for the test.

    Args:
        model: An unpatched vision-language model; it is unpatched afterwards. The certificate holds only for the same
            batch size, dtype and attention implementation.
        prompts: Keyword arguments of the model's calls as its processor returns them, each a batch of one, without
            answers.
        method: Name, class or instance of the method.
        risk: Largest allowed share of changed answers, in (0, 1).
        confidence: Probability that the risk is not exceeded, in (0, 1).
        candidates: Ratios or `vtprune.Auto`s in the order of testing, fixed before any data is seen; the test ends at
            the first one that fails.
        pictures: The picture of each prompt; by default every prompt has its own.
        max_new_tokens: Length limit of the compared answers.
        log: Called with a line for every candidate.

    Returns:
        Certificate: With ratio 1.0 where no candidate could be certified.

    Raises:
        CertificateError: There is no prompt, none has a visual token, or a number is out of range.
        InputError: `prompts` is a single prompt, or holds something else.
        VTPruneError: The model is patched, or `max_new_tokens` is below 1.
    """
    _check(risk, confidence, candidates)
    refuse_below_one(max_new_tokens=max_new_tokens)
    refuse_patched(model, "certifying a ratio")
    pruner, prompts = resolve(method), list(batches_of(prompts))
    names: Sequence[Hashable] = range(len(prompts)) if pictures is None else pictures
    if not prompts or len(names) != len(prompts):
        raise CertificateError(
            f"found {len(prompts)} prompts and {len(names)} pictures; expected at least one prompt and one picture "
            "per prompt"
        )
    n, single = len(set(names)), len(set(names)) == len(prompts)
    reference = [answer(model, prompt, max_new_tokens) for prompt in prompts]
    certified: float | Auto = 1.0
    tried: list[dict[str, Any]] = []
    changed = 0.0
    for candidate in candidates:
        losses = _losses(model, prompts, reference, pruner, candidate, max_new_tokens)
        mean = float(group_means(losses, names).mean())
        p = exact_p_value(round(mean * n), n, risk) if single else p_value(mean, n, risk)
        tried.append({"candidate": str(candidate), "changed": mean, "p_value": p})
        passed = p <= 1 - confidence
        log(describe(tried[-1], risk, confidence, passed))
        if not passed:
            break
        certified, changed = candidate, mean
    about = {"versions": progress.versions(), "max_new_tokens": max_new_tokens, "batch_size": 1}
    about["dtype"] = str(next(model.parameters()).dtype).removeprefix("torch.")
    folder = getattr(model.config, "_name_or_path", None)
    about["files_hash"] = files_hash(folder) if folder else None
    about["attention"] = str(getattr(model.config, "_attn_implementation", None))
    return Certificate.of(
        model, pruner, certified, risk=risk, confidence=confidence, pictures=n, questions=len(prompts), changed=changed,
        tried=tried, about=about,
    )  # fmt: skip


def describe(row: Mapping[str, Any], risk: float, confidence: float, passed: bool) -> str:
    """One line about a candidate; if it failed, with the number of pictures that a certificate would need."""
    text = f"ratio {row['candidate']}: {row['changed']:.1%} of answers changed, p = {row['p_value']:.2g}"
    if passed:
        return f"{text}: certified"
    needed = pictures_needed(row["changed"], risk, 1 - confidence)
    if needed is None:
        return f"{text}: not certified; the share of changed answers is above the allowed {risk:g}"
    return f"{text}: not certified; with this share of changed answers it would take {needed:,} pictures"


def _check(risk: float, confidence: float, candidates: Sequence[float | Auto]) -> None:
    for name, value in (("risk", risk), ("confidence", confidence)):
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1:
            raise CertificateError(f"{name} is {value!r}; expected a probability above 0 and below 1")
    if not candidates:
        raise CertificateError("there are no candidates; expected at least one ratio, the largest first")
    for candidate in candidates:
        if not isinstance(candidate, Auto) and not (isinstance(candidate, (int, float)) and 0 < candidate <= 1):
            raise CertificateError(f"candidate {candidate!r} is not a ratio; expected a share in (0, 1], or an Auto")
    keys = [c.energy if isinstance(c, Auto) else float(c) for c in candidates]
    if len({type(c) is Auto for c in candidates}) > 1 or keys != sorted(keys, reverse=True):
        raise CertificateError(
            "candidates are not in descending order; expected all ratios or all energies, the largest first"
        )


@torch.no_grad()
def answer(model: Any, inputs: Mapping[str, Any], max_new_tokens: int) -> list[int]:
    """Token ids of the greedy answer to a prompt, a batch of one."""
    settings = {"max_new_tokens": max_new_tokens, "do_sample": False}
    out = model.generate(**inputs, **settings, return_dict_in_generate=True, output_logits=True)
    if len(out.sequences) != 1:
        raise CertificateError(f"a prompt has {len(out.sequences)} samples; expected batches of one")
    refuse_nan(torch.cat(out.logits))
    return out.sequences[0, inputs["input_ids"].shape[1] :].tolist()


def _losses(
    model: nn.Module,
    prompts: Sequence[Mapping[str, Any]],
    reference: Sequence[list[int]],
    method: Method,
    candidate: float | Auto,
    max_new_tokens: int,
) -> list[float]:
    """For every prompt, 1.0 if its answer changed, else 0.0."""
    losses, visual = [], False
    with patch(model, ratio=candidate, method=method) as running:
        for prompt, expected in zip(prompts, reference, strict=True):
            try:
                losses.append(float(answer(model, prompt, max_new_tokens) != expected))
            except NothingPrunedError:  # with so few tokens the ratio rounds to all of them
                losses.append(0.0)
                visual = True
        visual = visual or running.last is not None
    if not visual:
        raise CertificateError(NO_PICTURES)
    return losses
