# SPDX-License-Identifier: Apache-2.0
"""Fidelity of pruned models to the unpruned one, without labels, together with their time.

Every prompt is answered by the unpruned model, the reference, and then by every method at every ratio; all are timed
side by side, in an order that rotates from prompt to prompt.
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

from ..engine.patching import patch, refuse_patched
from ..errors import BudgetError, MethodError, NothingPrunedError, VTPruneError
from ..methods import Method
from . import metrics, stopwatch
from .given import refuse_below_one
from .intervals import bootstrap, group_means, wilson
from .resize import MORE, NAME, regained, rival

_NUMBER = {"type": "number", "minimum": -1e12, "maximum": 1e12}
_SHARE = {"type": "number", "minimum": 0, "maximum": 1}
_REFUSED = {"type": "object", "required": ["refused"], "properties": {"refused": {"type": "string"}}}
_MEASURED = {
    "kl": _NUMBER,
    "top1": _SHARE,
    "answers": _SHARE,
    "prefix": _SHARE,
    "cosine": _NUMBER,
    "attention_errors": {"type": "array", "items": {"type": ["number", "null"]}},
    "seconds": {**_NUMBER, "exclusiveMinimum": 0},
    "selection_seconds": {**_NUMBER, "minimum": 0},
    "visual": {**_NUMBER, "type": "integer", "minimum": 1},
    "kept": {**_NUMBER, "type": "integer", "minimum": 1},
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
    """JSON Schema of the return value of `measure_prompt`."""
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
    """JSON Schema of the return value of `summarize`."""
    estimates = dict.fromkeys(("kl", "cosine", "prefix", "top1", "answers", "relative_time"), _ESTIMATE)
    numbers = dict.fromkeys(("kept", "visual", "mean_ratio", "seconds", "selection_seconds"), _NUMBER)
    measured = {**estimates, **numbers, "frontier": {"type": "boolean"}}
    beside = {
        "type": ["object", "null"],
        "required": ["ratio", "kl", "changed", "kept"],
        "properties": {"ratio": _SHARE, "kl": _ESTIMATE, "changed": {"type": "integer"}, "kept": {"type": "integer"}},
    }
    measured |= {"equal_tokens": beside, "equal_time": beside}
    row = {
        "type": "object",
        "required": ["method", "ratio"],
        "properties": {"method": {"type": "string"}, "ratio": _SHARE},
        "if": {"required": ["refused"]},
        "then": _REFUSED,
        "else": {"required": [*measured], "properties": {**measured, "attention_error": _ESTIMATE}},
    }
    return {"type": "array", "items": row, "minItems": len(variants), "maxItems": len(variants)}


# Shares get Wilson intervals, means and medians a bootstrap over pictures.
SHARES = ("top1", "answers")
MEANS = ("kl", "cosine", "prefix", "attention_error")


@dataclass(frozen=True)
class Prompt:
    """One question about one picture.

    Attributes:
        inputs: Keyword arguments of the model's call, batch of one, on the model's device.
        picture: Identifier of the picture; prompts about the same picture are not independent.
        smaller: Returns the inputs of the same prompt with a smaller picture, and their number of visual tokens, which
            is at most the one it is given; see `vtprune.study.resize`. None leaves resizing out.
    """

    inputs: Mapping[str, Any]
    picture: Hashable
    smaller: Callable[[int], tuple[Mapping[str, Any], int]] | None = None


@dataclass(frozen=True)
class Variant:
    """A method at a ratio, or a smaller picture.

    Attributes:
        label: Name in results.
        method: The method; None for the unpruned model on a picture with no more tokens.
        ratio: Share of visual tokens kept. Where the prompt can be resized, methods keep as many as its smaller picture
            has, which is a little less after the processor's rounding.
    """

    label: str
    method: Method | None
    ratio: float

    @property
    def key(self) -> str:
        return f"{self.label} {self.ratio:g}"


def with_resizing(variants: Sequence[Variant]) -> list[Variant]:
    """The variants, and smaller pictures of as many tokens, and of more for comparisons at equal time."""
    ratios = sorted({variant.ratio for variant in variants} | set(MORE), reverse=True)
    return [*variants, *(Variant(NAME, None, ratio) for ratio in ratios)]


@dataclass(frozen=True)
class _Settings:
    max_new_tokens: int
    repeats: int
    clock: Callable[[], float]


@dataclass
class _Reference:
    """The unpruned model on one prompt; `rows` is the number of tokens after the last visual one, at least 1."""

    outputs: metrics.PrefillOutputs
    visual: int
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
    """Measures one prompt with the unpruned model and every variant.

    Args:
        model: An unpatched vision-language model; it is unpatched afterwards.
        prompt: A prompt with at least one visual token.
        variants: Methods and ratios to compare with the unpruned model.
        turn: Index of the prompt, by which the order of the variants rotates.
        max_new_tokens: Length limit of the greedy answers.
        repeats: Timed calls of each variant.
        clock: Clock of `seconds`; `time.process_time` on a machine that other programs share.

    Returns:
        dict: Numbers of each variant by its key, or `{"refused": reason}`; for `"unpruned"` its `seconds`. The numbers:
        `kl` in nats and `top1` (next token), `answers` and `prefix` (greedy answers: equal or not, share of the
        unpruned one before the first difference), `cosine` (last hidden state), `attention_errors` (a relative error
        per cut: see `attention_errors`), `seconds` from inputs to the first token's logits including vision tower and
        selection, `selection_seconds`, `visual`, `kept` and `mean_ratio`.

    Raises:
        VTPruneError: The model is patched, the prompt is not one sample with visual tokens, or a count is below 1.
    """
    refuse_patched(model, "measuring")
    refuse_below_one(max_new_tokens=max_new_tokens, repeats=repeats)
    settings = _Settings(max_new_tokens, repeats, clock)
    reference = _reference(model, prompt.inputs, settings)
    records: dict[str, dict[str, Any]] = {"unpruned": {"seconds": reference.seconds}}
    first = turn % max(1, len(variants))
    resizes = {variant.ratio for variant in variants if variant.method is None}
    small = {ratio: _smaller(prompt, int(ratio * reference.visual)) for ratio in resizes}
    for variant in (*variants[first:], *variants[:first]):
        made = small.get(variant.ratio)
        try:
            if variant.method is None:
                records[variant.key] = _resized(reference, model, made, settings)
                continue
            count = None if made is None or isinstance(made, MethodError) else made[1]
            records[variant.key] = _against(reference, model, prompt.inputs, variant, count, settings)
        except (BudgetError, MethodError, NothingPrunedError) as error:
            records[variant.key] = {"refused": str(error)}
    return records


def _reference(model: nn.Module, inputs: Mapping[str, Any], settings: _Settings) -> _Reference:
    # Keeps all tokens: warms up, and finds the visual positions.
    with patch(model, ratio=1.0, method="uniform") as everything:
        metrics.next_token_logits(model, inputs)
        last = everything.last
    if last is None or not len(last.visual[0]):
        raise VTPruneError("a prompt has no visual token; expected a picture in every prompt")
    if len(last.visual) > 1:
        raise VTPruneError(f"a prompt has {len(last.visual)} samples; expected batches of one")
    rows = max(1, last.columns - 1 - int(last.visual[0].max()))
    outputs = metrics.capture(model, inputs, rows)
    answer, seconds = _answer(model, inputs, settings), _seconds(model, inputs, settings)
    return _Reference(outputs, len(last.visual[0]), rows, answer, seconds)


_Smaller = tuple[Mapping[str, Any], int] | MethodError


def _smaller(prompt: Prompt, tokens: int) -> _Smaller:
    """The prompt with a smaller picture and its visual tokens; or why there is none."""
    if prompt.smaller is None:
        return MethodError("the prompts came without a way to resize their pictures")
    try:
        return prompt.smaller(max(1, tokens))
    except MethodError as error:
        return error


def _resized(reference: _Reference, model: nn.Module, small: _Smaller | None, settings: _Settings) -> dict[str, Any]:
    """The unpruned model on a smaller picture."""
    assert small is not None
    if isinstance(small, MethodError):
        raise small
    inputs, count = small
    got = metrics.capture(model, inputs, reference.rows)
    return {
        **_compared(reference, got, _answer(model, inputs, settings)),
        "attention_errors": [None],
        "seconds": _seconds(model, inputs, settings),
        "selection_seconds": 0.0,
        "visual": reference.visual,
        "kept": count,
        "mean_ratio": count / reference.visual,
    }


def _compared(reference: _Reference, got: metrics.PrefillOutputs, answer: list[int]) -> dict[str, float]:
    """Next token, last state and answer beside those of the unpruned model."""
    want = reference.outputs
    same = [a == b for a, b in zip(reference.answer, answer, strict=False)]
    common = same.index(False) if False in same else len(same)
    return {
        "kl": float(metrics.divergence(want.logits, got.logits)),
        "top1": float(want.logits.argmax() == got.logits.argmax()),
        "answers": float(reference.answer == answer),
        "prefix": common / len(reference.answer),
        "cosine": float(metrics.cosine(want.state.double(), got.state.double())),
    }


def _against(
    reference: _Reference,
    model: nn.Module,
    inputs: Mapping[str, Any],
    variant: Variant,
    count: int | None,
    settings: _Settings,
) -> dict[str, Any]:
    """A method that keeps `count` tokens, or the variant's share of them."""
    budget: dict[str, Any] = {"ratio": variant.ratio} if count is None else {"keep": count}
    with patch(model, **budget, method=variant.method) as running:
        got = metrics.capture(model, inputs, reference.rows)
        last, cuts = running.last, [stage.layer for stage in running.schedule]
        assert last is not None
        selection: list[float] = []
        seconds = _seconds(
            model, inputs, settings, lambda: selection.append(running.last.selection_time if running.last else 0)
        )
        answer = _answer(model, inputs, settings)
    return {
        **_compared(reference, got, answer),
        "attention_errors": attention_errors(reference.outputs.attention, got.attention, cuts),
        "seconds": seconds,
        "selection_seconds": statistics.median(selection),
        "visual": len(last.visual[0]),
        "kept": len(last.kept[0]),
        "mean_ratio": last.mean_ratio,
    }


def attention_errors(
    reference: Mapping[int, Tensor], pruned: Mapping[int, Tensor], cuts: Iterable[int]
) -> list[float | None]:
    """Relative error of the attention output against the unpruned model, at each cut of a method.

    `|a - b| / |b|` over the text after the last visual token and all heads, before the output projection, in the layer
    after the cut, or the next one with an attention function. At a method's first cut the layer's input is that of the
    unpruned model, so the error is due to the selection alone; at later cuts it accumulates.

    Args:
        reference, pruned: `PrefillOutputs.attention` of the unpruned and the pruned model.
        cuts: Layers before which tokens are dropped.

    Returns:
        list: One number per cut; None if no layer after the cut has attention.
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
    """Median seconds of a call from inputs to next-token logits; the caller has warmed up."""
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
    """Summarizes the records of all prompts, one row per variant.

    Intervals are 95 % intervals. Prompts about one picture count as one observation: means are bootstrapped over
    pictures, and the Wilson intervals of shares use the number of pictures as the sample size.

    Args:
        records: Return values of `measure_prompt`.
        pictures: The picture of each record.
        variants: Variants to summarize.

    Returns:
        list: `method`, `ratio`, and either `refused` or `kept`, `visual`, `mean_ratio`, `seconds` and
        `selection_seconds` (medians), `cuts_error` (mean attention error of each cut), for each of `kl`, `cosine`,
        `prefix`, `attention_error` (the last cut), `top1`, `answers` and `relative_time` (median of the time relative
        to the unpruned model on the same prompt) a `value` and an `interval` (None for means of one picture);
        `frontier`, whether no other row, nor the unpruned model, is both faster and closer (`kl`); and beside resized
        pictures, `equal_tokens` and `equal_time` (the largest that takes no more time): the `ratio` of their row, the
        difference in `kl`, the number of answers that they `changed`, and how many of those this row `kept`.
    """
    rows = [_row(variant, [record[variant.key] for record in records], records, pictures) for variant in variants]
    ran = [row for row in rows if "refused" not in row]
    best = frontier([(row["relative_time"]["value"], row["kl"]["value"]) for row in ran] + [(1.0, 0.0)])
    for row, on in zip(ran, best, strict=False):
        row["frontier"] = on
    times = {r["ratio"]: r["relative_time"]["value"] for r in ran if r["method"] == NAME}
    for row in ran:
        mine, ratio = f"{row['method']} {row['ratio']:g}", row["ratio"]
        faster = rival(row["relative_time"]["value"], times)
        for name, other in (("equal_tokens", ratio if ratio in times else None), ("equal_time", faster)):
            row[name] = None if row["method"] == NAME else _beside(mine, other, records, pictures)
    return rows


def _beside(
    key: str,
    ratio: float | None,
    records: Sequence[Mapping[str, Mapping[str, Any]]],
    pictures: Sequence[Hashable],
) -> dict[str, Any] | None:
    """A variant beside the resized pictures of a ratio; None where there are none."""
    if ratio is None:
        return None
    pairs = [(record[key], record[f"{NAME} {ratio:g}"]) for record in records]
    means = group_means([mine["kl"] - other["kl"] for mine, other in pairs], pictures)
    changed, kept = regained(
        [True] * len(pairs), [other["answers"] == 1 for _, other in pairs], [mine["answers"] == 1 for mine, _ in pairs]
    )
    difference = _with(float(means.mean()), _bootstrap(means))
    return {"ratio": ratio, "kl": difference, "changed": changed, "kept": kept}


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
    for name in ("seconds", "selection_seconds"):
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
    """Bootstrap interval; None for a single picture."""
    return bootstrap(values, statistic) if len(values) > 1 else None


def _with(value: float, interval: tuple[float, float] | None) -> dict[str, Any]:
    """A value and its interval, rounded to six significant digits."""
    bounds = None if interval is None else [float(f"{bound:.6g}") for bound in interval]
    return {"value": float(f"{value:.6g}"), "interval": bounds}


def frontier(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Whether each point is Pareto-optimal: no other point is at most as large in both numbers and smaller in one."""

    def beats(a: tuple[float, float], b: tuple[float, float]) -> bool:
        return a[0] <= b[0] and a[1] <= b[1] and a != b

    return [not any(beats(other, point) for other in points) for point in points]
