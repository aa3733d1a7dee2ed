# SPDX-License-Identifier: Apache-2.0
"""Comparison of methods on the same prompts at equal cost, by their distance to the unpruned model."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..engine.patching import Patch, inspect, patch, refuse_patched
from ..errors import BudgetError, MethodError, NothingPrunedError, VTPruneError
from ..methods import Method, names, resolve
from ..report.pruning import Pruning
from ..report.tower import TowerPruning
from . import metrics
from .given import batches_of, refuse_below_one
from .resize import NAME

BASELINES = ("random", "uniform")


@dataclass(frozen=True)
class Row:
    """Results of one method over all prompts; all numbers are None if it cannot run.

    Attributes:
        method: Label of the method.
        visual: Visual tokens of a prompt (mean over prompts).
        kept: Visual tokens that reach the last layer (mean over prompts).
        mean_ratio: Measured mean share of visual tokens over the inputs of the decoder layers.
        kl: Divergence of the next-token distribution from the unpruned model's, in nats (mean).
        top1: Share of prompts whose most likely next token is that of the unpruned model.
        seconds: Selection time of one call, with the removal of the dropped tokens (median).
        tower, decoder: Operations to the first token in the vision tower and in projector and decoder, as shares of the
            unpruned ones in both (mean over prompts); None where the tower's are not known.
        reason: Why the method cannot run, or None.
    """

    method: str
    visual: float | None = None
    kept: float | None = None
    mean_ratio: float | None = None
    kl: float | None = None
    top1: float | None = None
    seconds: float | None = None
    tower: float | None = None
    decoder: float | None = None
    reason: str | None = None


def common_ratio(methods: Iterable[str | Method], num_layers: int) -> float:
    """Smallest `mean_ratio` that all given methods can meet, rounded up to a tenth (0.95 instead of 1).

    Args:
        methods: Names or methods.
        num_layers: Layers of the decoder.

    Returns:
        float: A `mean_ratio` above the share of layers before the latest first cut.
    """
    first = max((tuple(resolve(method).schedule(num_layers))[0].layer for method in methods), default=0)
    tenths = first * 10 // num_layers + 1
    return tenths / 10 if tenths < 10 else 0.95


def compare(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    mean_ratio: float,
    methods: str | Sequence[str] | Mapping[str, str | Method] | None = None,
    repeats: int = 3,
    log: Callable[[str], None] = lambda text: None,
    smaller: Callable[[int, int], tuple[Mapping[str, Any], int]] | None = None,
) -> list[Row]:
    """Runs methods on the same prompts at the same mean share of visual tokens over the decoder layers' inputs.

    Args:
        model: An unpatched vision-language model; it is unpatched afterwards.
        batches: Keyword arguments of its calls, each with one or more prompts, all with pictures.
        mean_ratio: The cost, in (0, 1].
        methods: One or several names, or methods by label; by default all registered ones. `random` and `uniform`
            always run.
        repeats: Timed calls per batch; the first one of a method is a warm-up if there are others.
        log: Called with a line of text after every method.
        smaller: Makes prompt `n` with a smaller picture, and says how many visual tokens that has, at most those it is
            given: `smaller(n, tokens)`. Adds the row `resize`, the unpruned model on these pictures (batches of one
            prompt). The methods then run at the share of tokens that these have, which the processor's rounding makes
            a little less than `mean_ratio`; those that cannot run at `mean_ratio`. See `vtprune.study.resize`.

    Returns:
        list[Row]: By ascending divergence; methods that cannot run on this model at this cost come last.

    Raises:
        BudgetError: `mean_ratio` is out of range.
        MethodError: A name is unknown.
        InputError: `batches` is a single batch, or holds something else.
        VTPruneError: The model is patched, there are no prompts, or `repeats` is below 1.
        UnsupportedModelError: A part of the model was not found.
    """
    given = names() if methods is None else [methods] if isinstance(methods, str) else methods
    asked = dict(given) if isinstance(given, Mapping) else dict(zip(given, given, strict=True))
    chosen = {label: resolve(method) for label, method in ({name: name for name in BASELINES} | asked).items()}
    refuse_patched(model, "comparing methods")
    inspect(model)  # raises for models that no method supports
    patch(model, mean_ratio=mean_ratio, method="uniform").remove()
    refuse_below_one(repeats=repeats)
    batches = list(batches_of(batches))
    if not batches:
        raise VTPruneError("there are no prompts; expected at least one batch")
    reference = [metrics.next_token_logits(model, batch) for batch in batches]
    rows = []
    shares = [mean_ratio]
    if smaller is not None:
        try:
            rows.append(_resized(model, batches, reference, mean_ratio, smaller))
            shares.insert(0, rows[0].mean_ratio or mean_ratio)
        except MethodError as error:
            rows.append(Row(NAME, reason=str(error)))
        log(f"{NAME}: {rows[-1].reason or f'{rows[-1].kl:.4g} nats'}")
    for label, method in chosen.items():
        for share in shares:
            try:
                row = _run(label, method, model, batches, reference, share, repeats)
                break
            except (BudgetError, MethodError, NothingPrunedError) as error:
                row = Row(label, reason=str(error))
        rows.append(row)
        log(f"{label}: {row.reason or f'{row.kl:.4g} nats'}")
    return sorted(rows, key=lambda row: (row.kl is None, row.kl or 0.0, row.method))


@dataclass
class _Outcome:
    """What was measured of one method so far, a number per prompt."""

    visual: list[int] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    inputs: list[float] = field(default_factory=list)  # visual tokens at the layers' inputs, mean over layers
    kl: list[float] = field(default_factory=list)
    same: list[bool] = field(default_factory=list)
    costs: list[tuple[float, float]] = field(default_factory=list)

    def add(self, want: Tensor, got: Tensor, ran: TowerPruning | None, unpruned: TowerPruning | None) -> None:
        """Adds the logits of a batch, and its operations as shares of all unpruned ones to the first token."""
        self.kl += metrics.divergence(want, got).tolist()
        self.same += (want.argmax(-1) == got.argmax(-1)).tolist()
        if ran is not None and unpruned is not None:
            whole = unpruned.first_token[0]
            self.costs.append((ran.flops[1] / whole, ran.rest[1] / whole))

    def row(self, label: str, seconds: float) -> Row:
        tower, decoder = (
            (statistics.fmean(part) for part in zip(*self.costs, strict=True)) if self.costs else (None, None)
        )
        return Row(
            method=label,
            visual=statistics.fmean(self.visual),
            kept=statistics.fmean(self.kept),
            mean_ratio=sum(self.inputs) / sum(self.visual),
            kl=statistics.fmean(self.kl),
            top1=statistics.fmean(self.same),
            seconds=seconds,
            tower=tower,
            decoder=decoder,
        )


def _last(running: Patch, before: Pruning | None) -> Pruning:
    """The record of the last call; one without visual tokens has left that of the call before it."""
    if running.last is None or running.last is before:
        raise VTPruneError("a prompt has no visual token; expected pictures in every prompt")
    return running.last


def _run(
    label: str,
    method: Method,
    model: nn.Module,
    batches: list[Mapping[str, Any]],
    reference: list[Tensor],
    mean_ratio: float,
    repeats: int,
) -> Row:
    found = _Outcome()
    seconds: list[float] = []
    with patch(model, mean_ratio=mean_ratio, method=method) as running:
        for batch, want in zip(batches, reference, strict=True):
            for repeat in range(repeats):
                before = running.last
                got, last = metrics.next_token_logits(model, batch), _last(running, before)
                seconds.append(last.selection_time)
                if repeat:
                    continue
                found.visual += map(len, last.visual)
                found.kept += map(len, last.kept)
                found.inputs += [sum(last.per_layer(s)) / last.shape.layers for s in range(len(last.visual))]
                found.add(want, got, last.tower, last.tower)
    return found.row(label, statistics.median(seconds[1:] or seconds))


def _resized(
    model: nn.Module,
    batches: list[Mapping[str, Any]],
    reference: list[Tensor],
    mean_ratio: float,
    smaller: Callable[[int, int], tuple[Mapping[str, Any], int]],
) -> Row:
    """The unpruned model on smaller pictures, whose tokens are counted after the processor's rounding."""
    found = _Outcome()
    with patch(model, ratio=1.0, method="uniform") as counting:  # drops nothing
        for number, (batch, want) in enumerate(zip(batches, reference, strict=True)):
            before = counting.last
            metrics.next_token_logits(model, batch)
            whole = _last(counting, before)
            visual = sum(map(len, whole.visual))
            inputs, count = smaller(number, int(mean_ratio * visual))
            got = metrics.next_token_logits(model, inputs)
            found.visual.append(visual)
            found.kept.append(count)
            found.inputs.append(count)
            found.add(want, got, _last(counting, whole).tower, whole.tower)
    return found.row(NAME, 0.0)
