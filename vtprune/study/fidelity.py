# SPDX-License-Identifier: Apache-2.0
"""How much pruning changes what a model says, without labels, beside the time that it takes.

Every prompt is answered by the unpruned model and then by every method at every ratio; all are timed side by side, in
an order that turns from prompt to prompt. Nothing but the pictures is needed: the unpruned model is the reference.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..engine.patching import find_patch, patch
from ..errors import BudgetError, MethodError, NothingPrunedError, VTPruneError
from ..methods import Method
from . import metrics, stopwatch
from .intervals import bootstrap, group_means, wilson

_NUMBER = {"type": "number"}
_SHARE = {"type": "number", "minimum": 0, "maximum": 1}
_REFUSED = {"type": "object", "required": ["refused"], "properties": {"refused": {"type": "string"}}}
_MEASURED = {
    "kl": _NUMBER,
    "top1": _SHARE,
    "answers": _SHARE,
    "prefix": _SHARE,
    "cosine": _NUMBER,
    "attention_errors": {"type": "array", "items": {"type": ["number", "null"]}},
    "seconds": {"type": "number", "exclusiveMinimum": 0},
    "deciding": {"type": "number", "minimum": 0},
    "visual": {"type": "integer", "minimum": 1},
    "kept": {"type": "integer", "minimum": 1},
    "mean_ratio": _SHARE,
}
_ESTIMATE = {
    "type": "object",
    "required": ["value", "interval"],
    "properties": {
        "value": _NUMBER,
        "interval": {"type": ["array", "null"], "items": _NUMBER, "minItems": 2, "maxItems": 2},
    },
}


def record_schema(variants: Sequence[Variant]) -> dict[str, Any]:
    """JSON Schema of what `measure_prompt` returns."""
    answered = {"type": "object", "required": [*_MEASURED], "properties": _MEASURED}
    keys = [variant.key for variant in variants]
    unpruned = {"type": "object", "required": ["seconds"], "properties": {"seconds": _MEASURED["seconds"]}}
    return {
        "type": "object",
        "required": ["unpruned", *keys],
        "properties": {"unpruned": unpruned},
        "additionalProperties": {"if": {"required": ["refused"]}, "then": _REFUSED, "else": answered},
    }


def rows_schema(variants: Sequence[Variant]) -> dict[str, Any]:
    """JSON Schema of what `summarize` returns."""
    estimates = dict.fromkeys(("kl", "cosine", "prefix", "top1", "answers", "relative_time"), _ESTIMATE)
    numbers = dict.fromkeys(("kept", "visual", "mean_ratio", "seconds", "deciding"), _NUMBER)
    measured = {**estimates, **numbers, "frontier": {"type": "boolean"}}
    row = {
        "type": "object",
        "required": ["method", "ratio"],
        "properties": {"method": {"type": "string"}, "ratio": _SHARE},
        "if": {"required": ["refused"]},
        "then": _REFUSED,
        "else": {"required": [*measured], "properties": {**measured, "attention_error": _ESTIMATE}},
    }
    return {"type": "array", "items": row, "minItems": len(variants), "maxItems": len(variants)}


# What a row holds of every quantity: shares get a Wilson interval, means and medians a bootstrap over pictures.
SHARES = ("top1", "answers")
MEANS = ("kl", "cosine", "prefix", "attention_error")


@dataclass(frozen=True)
class Prompt:
    """One question about one picture.

    Attributes:
        inputs: Keyword arguments of the model's call, batch of one, on the model's device.
        picture: Name of the picture; prompts about one picture are not independent of each other.
    """

    inputs: Mapping[str, Any]
    picture: Hashable


@dataclass(frozen=True)
class Variant:
    """A method at a ratio.

    Attributes:
        label: What it is called in results.
        method: The method.
        ratio: Share of visual tokens kept.
    """

    label: str
    method: Method
    ratio: float

    @property
    def key(self) -> str:
        return f"{self.label} {self.ratio:g}"


@dataclass(frozen=True)
class _Settings:
    max_new_tokens: int
    repeats: int
    clock: Callable[[], float]


@dataclass
class _Reference:
    """The unpruned model on one prompt. `rows` are the text columns after the last visual token, 1 at least."""

    reading: metrics.PrefillOutputs
    rows: int
    answer: list[int]
    seconds: float


def measure_prompt(
    model: nn.Module,
    prompt: Prompt,
    variants: Sequence[Variant],
    *,
    turn: int = 0,
    max_new_tokens: int = 16,
    repeats: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, dict[str, Any]]:
    """One prompt, unpruned and every variant.

    Args:
        model: A vision-language model without a patch; it has none afterwards.
        prompt: With at least one visual token.
        variants: What is compared with the unpruned model.
        turn: Number of the prompt: which of the variants comes first.
        max_new_tokens: Length limit of the greedy answers.
        repeats: Timed calls of each.
        clock: What `seconds` are counted with; `time.process_time` where other programs disturb.

    Returns:
        dict: Key of a variant to its numbers, or to `{"refused": reason}`; `"unpruned"` to its `seconds`. The numbers:
        `kl` in nats and `top1` (next token), `answers` and `prefix` (greedy answers: equal or not, share of the
        unpruned one before the first difference), `cosine` (last hidden state), `attention_errors` (a relative error
        for every cut: see `attention_errors`), `seconds` from inputs to the first token's logits with vision tower and
        deciding, `deciding`, `visual`, `kept` and `mean_ratio`.

    Raises:
        VTPruneError: The model is patched, or the prompt holds no visual token.
    """
    if find_patch(model) is not None:
        raise VTPruneError("the model is patched: remove the patch before it is measured")
    settings = _Settings(max_new_tokens, repeats, clock)
    reference = _reference(model, prompt.inputs, settings)
    records: dict[str, dict[str, Any]] = {"unpruned": {"seconds": reference.seconds}}
    first = turn % max(1, len(variants))
    for variant in (*variants[first:], *variants[:first]):
        try:
            records[variant.key] = _against(reference, model, prompt.inputs, variant, settings)
        except (BudgetError, MethodError, NothingPrunedError) as error:
            records[variant.key] = {"refused": str(error)}
    return records


def _reference(model: nn.Module, inputs: Mapping[str, Any], settings: _Settings) -> _Reference:
    with patch(
        model, ratio=1.0, method="uniform"
    ) as finding:  # keeps all; warms up, and tells which columns are visual
        metrics.next_token_logits(model, inputs)
        last = finding.last
    if last is None or not len(last.visual[0]):
        raise VTPruneError("a prompt holds no visual token; expected a picture in every prompt")
    rows = max(1, last.columns - 1 - int(last.visual[0].max()))
    reading = metrics.capture(model, inputs, rows)
    return _Reference(reading, rows, _answer(model, inputs, settings), _seconds(model, inputs, settings))


def _against(
    reference: _Reference, model: nn.Module, inputs: Mapping[str, Any], variant: Variant, settings: _Settings
) -> dict[str, Any]:
    with patch(model, ratio=variant.ratio, method=variant.method) as running:
        got = metrics.capture(model, inputs, reference.rows)
        last, cuts = running.last, [stage.layer for stage in running.schedule]
        assert last is not None
        deciding: list[float] = []
        seconds = _seconds(
            model, inputs, settings, lambda: deciding.append(running.last.selection_time if running.last else 0)
        )
        answer = _answer(model, inputs, settings)
    want = reference.reading
    same = [a == b for a, b in zip(reference.answer, answer, strict=False)]
    common = same.index(False) if False in same else len(same)
    return {
        "kl": float(metrics.divergence(want.logits, got.logits)),
        "top1": float(want.logits.argmax() == got.logits.argmax()),
        "answers": float(reference.answer == answer),
        "prefix": common / len(reference.answer),
        "cosine": float(metrics.cosine(want.state.double(), got.state.double())),
        "attention_errors": attention_errors(want.attention, got.attention, cuts),
        "seconds": seconds,
        "deciding": statistics.median(deciding),
        "visual": len(last.visual[0]),
        "kept": len(last.kept[0]),
        "mean_ratio": last.mean_ratio,
    }


def attention_errors(
    reference: Mapping[int, Tensor], pruned: Mapping[int, Tensor], cuts: Iterable[int]
) -> list[float | None]:
    """How far the output of attention lies from the unpruned model's, at each cut of a method.

    `|a - b| / |b|` over the text after the last visual token and all heads, before the output projection, in the layer
    before which is cut; where that layer has no attention function, in the next one that has. At a method's first cut
    the layer's input is that of the unpruned model, so the error is that of the choice alone; at later ones it adds up.

    Args:
        reference, pruned: `PrefillOutputs.attention` of the unpruned and the pruned model.
        cuts: Layers before which is cut.

    Returns:
        list: One number per cut; None where no layer from the cut on attends.
    """
    layers = [min((n for n in reference if n >= cut), default=None) for cut in cuts]
    return [None if n is None else metrics.relative_error(reference[n], pruned[n]) for n in layers]


@torch.no_grad()
def _answer(model: Any, inputs: Mapping[str, Any], settings: _Settings) -> list[int]:
    out = model.generate(**inputs, max_new_tokens=settings.max_new_tokens, do_sample=False)
    return out[0, inputs["input_ids"].shape[1] :].tolist()


def _seconds(
    model: nn.Module, inputs: Mapping[str, Any], settings: _Settings, after: Callable[[], None] = lambda: None
) -> float:
    """Median time of a call from inputs to next-token logits; the caller has made one before."""
    device, times = inputs["input_ids"].device, []
    for _ in range(settings.repeats):
        stopwatch.synchronize(device)
        started = settings.clock()
        metrics.next_token_logits(model, inputs)
        stopwatch.synchronize(device)
        times.append(settings.clock() - started)
        after()
    return statistics.median(times)


def summarize(
    records: Sequence[Mapping[str, Mapping[str, Any]]], pictures: Sequence[Hashable], variants: Sequence[Variant]
) -> list[dict[str, Any]]:
    """Sums the records of all prompts up, a row per variant.

    Intervals are of 95 %. Prompts about one picture count as one observation: means are bootstrapped over pictures,
    and the Wilson intervals of shares have the number of pictures for their size.

    Args:
        records: What `measure_prompt` returned.
        pictures: The picture of each.
        variants: Rows wanted.

    Returns:
        list: `method`, `ratio`, and either `refused` or `kept`, `visual`, `mean_ratio`, `seconds` and `deciding`
        (medians), `cuts_error` (mean attention error of every cut), for each of `kl`, `cosine`, `prefix`,
        `attention_error` (the last cut), `top1`, `answers` and `relative_time` (median of the time over the unpruned
        one of the same prompt) a `value` and an `interval` (None for means of one picture); and `frontier`, whether
        nothing else, the unpruned model included, is both faster and nearer (`kl`).
    """
    rows = [_row(variant, [record[variant.key] for record in records], records, pictures) for variant in variants]
    ran = [row for row in rows if "refused" not in row]
    best = frontier([(row["relative_time"]["value"], row["kl"]["value"]) for row in ran] + [(1.0, 0.0)])
    for row, on in zip(ran, best, strict=False):
        row["frontier"] = on
    return rows


def _row(
    variant: Variant,
    mine: list[Mapping[str, Any]],
    records: Sequence[Mapping[str, Mapping[str, Any]]],
    pictures: Sequence[Hashable],
) -> dict[str, Any]:
    row: dict[str, Any] = {"method": variant.label, "ratio": variant.ratio}
    refused = next((record["refused"] for record in mine if "refused" in record), None)
    if refused is not None:
        return row | {"refused": refused}
    for name in ("visual", "kept", "mean_ratio"):
        row[name] = statistics.fmean(record[name] for record in mine)
    for name in ("seconds", "deciding"):
        row[name] = statistics.median(record[name] for record in mine)
    relative = [m["seconds"] / r["unpruned"]["seconds"] for m, r in zip(mine, records, strict=True)]
    per_picture = group_means(relative, pictures)
    row["relative_time"] = _with(float(np.median(per_picture)), _bootstrap(per_picture, np.median))
    columns = {name: [record[name] for record in mine] for name in (*SHARES, *MEANS) if name != "attention_error"}
    errors = [record["attention_errors"] for record in mine]
    if all(error is not None for prompt in errors for error in prompt):
        row["cuts_error"] = [round(statistics.fmean(cut), 6) for cut in zip(*errors, strict=True)]
        columns["attention_error"] = [prompt[-1] for prompt in errors]
    for name, values in columns.items():
        means = group_means(values, pictures)
        share = float(means.mean())
        row[name] = _with(share, wilson(share * len(means), len(means)) if name in SHARES else _bootstrap(means))
    return row


def _bootstrap(values: np.ndarray, statistic: Callable[..., np.ndarray] = np.mean) -> tuple[float, float] | None:
    """One picture tells nothing about others."""
    return bootstrap(values, statistic) if len(values) > 1 else None


def _with(value: float, interval: tuple[float, float] | None) -> dict[str, Any]:
    """Six significant digits are more than the intervals allow."""
    bounds = None if interval is None else [float(f"{bound:.6g}") for bound in interval]
    return {"value": float(f"{value:.6g}"), "interval": bounds}


def frontier(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which points no other one beats: none is at most as large in both numbers and smaller in one."""

    def beats(a: tuple[float, float], b: tuple[float, float]) -> bool:
        return a[0] <= b[0] and a[1] <= b[1] and a != b

    return [not any(beats(other, point) for other in points) for point in points]
