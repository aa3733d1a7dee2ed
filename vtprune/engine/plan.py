# SPDX-License-Identifier: Apache-2.0
"""How many visual tokens each method keeps at each of its cuts in a call."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core import budget as budgets
from ..core.budget import Budget
from ..core.transfer import to_device
from ..errors import UnsupportedModelError
from ..models.visual_tokens import VisualTokens
from . import readers, token_view
from .call import BudgetGroups, CallState, MethodPlan
from .spec import MethodUse, PruneSpec


@dataclass(frozen=True)
class Plan:
    """The cuts of a call.

    Attributes:
        cuts: The methods that drop tokens before a layer, by layer.
        required: `[M]` bool, visual tokens whose outputs the caller reads, so that they have to stay; None for none.
        required_layer_inputs: Layers whose input these methods read.
    """

    cuts: dict[int, list[MethodPlan]]
    required: Tensor | None
    required_layer_inputs: set[int]


def plan_of(call: CallState, visual: VisualTokens) -> Plan:
    """The plan of a call, shared by calls of the same layout where it depends on nothing else."""
    arguments, budget = call.options.arguments, call.options.budget
    asked = readers.positions_asked(arguments) if call.spec.anatomy.padding_id is None else None
    if asked is None or budget.auto is not None:
        return _make(call, visual)
    return visual.cached(("plan", call.spec, budget, asked), lambda: _make(call, visual))


def _make(call: CallState, visual: VisualTokens) -> Plan:
    arguments, budget, layers = call.options.arguments, call.options.budget, call.spec.anatomy.num_layers
    read = readers.read_columns(arguments, call.columns.real, call.spec.anatomy) & visual.mask
    plan = Plan({}, read[visual.sample, visual.position] if bool(read.any()) else None, set())
    methods = _groups(call.spec, visual)
    groups = [members for _, members in methods]
    # Required tokens count in the budget, and exceed it if necessary.
    least = None if plan.required is None else [members.count(plan.required.nonzero()[:, 0]) for members in groups]
    lasts = _counts_of_pictures(call, visual, groups) if budget.auto is not None else _split_keep(budget, groups, least)
    for number, ((use, members), last) in enumerate(zip(methods, lasts, strict=True)):
        counts = budgets.plan(budget, use.schedule, layers, members.sizes, [*members.by_sample.values()], last)
        if least is not None:
            needed = least[number]
            readers.warn_of_labels(arguments, sum(needed), sum(counts[-1]))
            counts = [[max(pair) for pair in zip(stage, needed, strict=True)] for stage in counts]
        if counts[-1] == members.sizes:
            continue
        part = MethodPlan(use, members, {s.layer: count for s, count in zip(use.schedule, counts, strict=True)})
        for layer in part.counts:
            plan.cuts.setdefault(layer, []).append(part)
        plan.required_layer_inputs.update(use.method.required_layer_inputs(layers))
    return plan


def _groups(spec: PruneSpec, visual: VisualTokens) -> list[tuple[MethodUse, BudgetGroups]]:
    """The methods that have tokens to prune in a call, and their budget groups."""
    if len(spec.uses) == 1:
        use, by = spec.uses[0], spec.method.group
        everything = token_view.all_tokens(visual)
        groups = visual.cached(("groups", by), lambda: BudgetGroups.of(visual, by, everything))
        return [(use, groups)] if len(everything) else []
    uses = [(use, use.members(visual.kind)) for use in spec.uses]
    return [(use, BudgetGroups.of(visual, use.method.group, rows)) for use, rows in uses if len(rows)]


# Final counts of each method's groups, for budgets that are not the same share of every group; None for the others.
_LastCounts = list[list[int] | None]


def _counts_of_pictures(call: CallState, visual: VisualTokens, groups: list[BudgetGroups]) -> _LastCounts:
    """Final counts for an automatic ratio, which counts every picture by itself."""
    auto = call.options.budget.auto
    assert auto is not None
    pictures = BudgetGroups.of(visual, "image", torch.arange(len(visual)))
    offsets = torch.tensor([0, *pictures.sizes]).cumsum(0)
    counts = torch.tensor(auto.counts(_features(call, visual), offsets))
    last: _LastCounts = []
    for members in groups:
        group = members.of_token[offsets[:-1]]
        of_others = group < 0
        total = torch.zeros(len(members.sizes) + 1, dtype=torch.int64)
        total.index_add_(0, torch.where(of_others, len(members.sizes), group), counts)
        last.append(total[:-1].tolist())
    return last


@torch.no_grad()
def _features(call: CallState, visual: VisualTokens) -> Tensor:
    """Features `[M, D]` of the visual tokens in the decoder's input; zero for tokens without a place in an image
    (unless none has one)."""
    if call.embeds is None:
        raise UnsupportedModelError(
            'ratio="auto" reads the visual features in inputs_embeds of the decoder, and this call passed none; '
            "use a fixed ratio"
        )
    sample, position = (to_device(t, call.embeds.device) for t in (visual.sample, visual.position))
    features, placed = call.embeds[sample, position], visual.grid_row >= 0
    return features * to_device(placed, features.device)[:, None] if bool(placed.any()) else features


def _split_keep(budget: Budget, groups: list[BudgetGroups], least: list[list[int]] | None) -> _LastCounts:
    """Final counts for `keep`, which is split over all groups of a sample.

    `least` are the tokens of each group that have to stay.
    """
    if budget.keep is None:
        return [None] * len(groups)
    sizes = [size for members in groups for size in members.sizes]
    by_sample: dict[int, list[int]] = {}
    start = 0
    for members in groups:
        for row, numbers in members.by_sample.items():
            by_sample.setdefault(row, []).extend(number + start for number in numbers)
        start += len(members.sizes)
    floors = [number for numbers in least or () for number in numbers]
    counts = iter(budgets.split_over_groups(budget.keep, sizes, [*by_sample.values()], floors))
    return [[next(counts) for _ in members.sizes] for members in groups]
