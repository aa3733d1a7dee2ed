# SPDX-License-Identifier: Apache-2.0
"""All methods on the same prompts at equal cost, by how near they come to the unpruned model."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..engine.patching import find_patch, inspect, patch
from ..errors import BudgetError, MethodError, NothingPrunedError, VTPruneError
from ..methods import Method, names, resolve
from . import metrics

BASELINES = ("random", "uniform")


@dataclass(frozen=True)
class Row:
    """One method over all prompts. The numbers are None where the method cannot be run, and then `reason` says why.

    Attributes:
        method: Its label.
        visual: Visual tokens of a prompt (mean over prompts).
        kept: Those that reach the last layer.
        mean_ratio: Mean share of visual tokens over the inputs of the decoder layers, as it came out.
        kl: Divergence of the next-token distribution from the unpruned one's, in nats (mean).
        top1: Share of prompts whose most likely next token is that of the unpruned model.
        seconds: Time to decide and compact, of one call (median).
        reason: TokenExplanation there are no numbers.
    """

    method: str
    visual: float | None = None
    kept: float | None = None
    mean_ratio: float | None = None
    kl: float | None = None
    top1: float | None = None
    seconds: float | None = None
    reason: str | None = None


def common_ratio(methods: Iterable[str | Method], num_layers: int) -> float:
    """The smallest cost that all of some methods can meet, in full tenths (0.95 where that is 1).

    Args:
        methods: Names or methods.
        num_layers: Layers of the decoder.

    Returns:
        float: A `mean_ratio` above the share of layers that run before any of the methods cuts.
    """
    first = max((tuple(resolve(method).schedule(num_layers))[0].layer for method in methods), default=0)
    tenths = first * 10 // num_layers + 1
    return tenths / 10 if tenths < 10 else 0.95


def compare(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    mean_ratio: float,
    methods: Sequence[str] | Mapping[str, str | Method] | None = None,
    repeats: int = 3,
    log: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Runs methods on the same prompts at the same mean share of visual tokens over the decoder-layer inputs.

    Args:
        model: A vision-language model without a patch; it has none afterwards.
        batches: Keyword arguments of its calls, one prompt or several each, all with pictures.
        mean_ratio: The cost, in (0, 1].
        methods: Names, or methods by label; all registered ones by default. `random` and `uniform` are always run.
        repeats: Calls per batch, for the time; the very first of a method is not counted if there are others.
        log: Called with a line of text after every method.

    Returns:
        list[Row]: By rising divergence; methods that cannot be run on this model at this cost come last.

    Raises:
        BudgetError: `mean_ratio` is out of range.
        MethodError: A name is unknown.
        VTPruneError: The model is patched, or there are no prompts.
        UnsupportedModelError: A part of the model was not found.
    """
    given = names() if methods is None else methods
    asked = dict(given) if isinstance(given, Mapping) else dict(zip(given, given, strict=True))
    chosen = {label: resolve(method) for label, method in ({name: name for name in BASELINES} | asked).items()}
    if find_patch(model) is not None:
        raise VTPruneError("the model is patched: remove the patch before methods are compared on it")
    inspect(model)  # what no method can do without is an error, not a row
    patch(model, mean_ratio=mean_ratio, method="uniform").remove()
    batches = list(batches)
    if not batches:
        raise VTPruneError("there are no prompts to compare methods on")
    reference = [metrics.next_token_logits(model, batch) for batch in batches]
    rows = []
    for label, method in chosen.items():
        try:
            rows.append(_run(label, method, model, batches, reference, mean_ratio, repeats))
        except (BudgetError, MethodError, NothingPrunedError) as error:
            rows.append(Row(label, reason=str(error)))
        log(f"{label}: {rows[-1].reason or f'{rows[-1].kl:.4g} nats'}")
    return sorted(rows, key=lambda row: (row.kl is None, row.kl or 0.0, row.method))


def _run(
    label: str,
    method: Method,
    model: nn.Module,
    batches: list[Mapping[str, Any]],
    reference: list[Tensor],
    mean_ratio: float,
    repeats: int,
) -> Row:
    visual: list[int] = []
    kept: list[int] = []
    inputs: list[float] = []  # visual tokens at the inputs of layers, mean over layers
    kl: list[float] = []
    same: list[bool] = []
    seconds: list[float] = []
    with patch(model, mean_ratio=mean_ratio, method=method) as running:
        for batch, want in zip(batches, reference, strict=True):
            for repeat in range(repeats):
                got = metrics.next_token_logits(model, batch)
                last = running.last
                if last is None:
                    raise VTPruneError("a prompt holds no visual token; expected pictures in every prompt")
                seconds.append(last.selection_time)
                if repeat:
                    continue
                visual += map(len, last.visual)
                kept += map(len, last.kept)
                inputs += [sum(last.per_layer(s)) / last.shape.layers for s in range(len(last.visual))]
                kl += metrics.divergence(want, got).tolist()
                same += (want.argmax(-1) == got.argmax(-1)).tolist()
    return Row(
        method=label,
        visual=statistics.fmean(visual),
        kept=statistics.fmean(kept),
        mean_ratio=sum(inputs) / sum(visual),
        kl=statistics.fmean(kl),
        top1=statistics.fmean(same),
        seconds=statistics.median(seconds[1:] or seconds),
    )
