# SPDX-License-Identifier: Apache-2.0
"""Checks a greedy selection by its rule: every pick must be the best row, given the previous picks.

Two correct programs may pick different rows if values are equal up to rounding, and diverge afterwards. A selection
that differs from the specification is therefore checked by its rule: `shortfall` is the largest difference between the
value of the best row and that of the pick, with values computed as in the specification.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from vtprune_kernels._ragged import finite, self_cosine, unit_rows
from vtprune_kernels.dpp_map.naive import EXHAUSTED  # of the residual, too, as computed on a GPU
from vtprune_kernels.facility_location.naive import gains as coverage_gains
from vtprune_kernels.facility_location.naive import usable, values
from vtprune_kernels.progressive_mmr.naive import gains, similarity


def farthest_point(order: Tensor, features: Tensor, weights: Tensor | None) -> Iterator[tuple[Tensor, int]]:
    """Yields the values `[n]` of all rows and the picked row, for each pick."""
    unit = unit_rows(features)
    if weights is None:
        value = torch.cat([_isolation(unit, rows) for rows in torch.arange(len(unit), device=unit.device).split(1024)])
        weight = torch.ones_like(value)
    else:
        value = weight = weights.float()
    near = torch.full_like(value, torch.inf)
    for pick in order.tolist():
        yield finite(value), pick
        near = torch.minimum(near, 1 - unit @ unit[pick])
        value = weight * near


def _isolation(unit: Tensor, rows: Tensor) -> Tensor:
    distance = 1 - unit[rows] @ unit.T
    distance[rows - rows[0], rows] = torch.inf
    return distance.amin(1)


def dpp(order: Tensor, features: Tensor, relevance: Tensor) -> Iterator[tuple[Tensor, int]]:
    """As `farthest_point`, while the picked rows leave residual variance."""
    unit, rel = unit_rows(features), torch.nan_to_num(relevance.float(), 0, 0, 0)
    variance = finite(self_cosine(features.float().norm(dim=1)) * rel.square())
    left, factors = variance.clone(), torch.zeros(len(order), len(unit), device=unit.device)
    for step, pick in enumerate(order.tolist()):
        gain = torch.where(left > EXHAUSTED * variance, left, 0)
        yield gain, pick
        if gain[pick] <= 0:
            return
        row = rel * (unit @ unit[pick]) * rel[pick]
        factors[step] = (row - factors[:step, pick] @ factors[:step]) / left[pick].sqrt()
        left = left - factors[step].square()


def mmr(
    order: Tensor,
    relevance: Tensor,
    keys: Tensor,
    values: Tensor,
    duplication: float = 0.5,
    chunk: int = 16,
    growth: float = 0.25,
    pool: int = 4,
    objective: str = "linear",
) -> Iterator[tuple[Tensor, int]]:
    """As `farthest_point`, among the candidates of each round; a pick outside them has the last candidate's value."""
    picks, done = order.tolist(), 0
    closest = torch.zeros(len(relevance), device=relevance.device)
    free = torch.ones_like(closest, dtype=torch.bool)
    while done < len(picks):
        count = min(len(picks) - done, chunk, max(1, int(growth * done)))
        start = gains(relevance.float(), closest, duplication, objective).masked_fill(~free, -torch.inf)
        last = start.topk(min(pool * count, int(free.sum()))).values[-1]
        for pick in picks[done : done + count]:
            yield (start - last).clamp_max(0), pick  # 0 if the pick was a candidate
            value = gains(relevance.float(), closest, duplication, objective)
            yield (
                value.masked_fill((start < last) & (torch.arange(len(value), device=value.device) != pick), -1e30),
                pick,
            )
            closest = torch.maximum(closest, similarity(keys, values, pick))
            free[pick] = False
        done += count


def coverage(order: Tensor, features: Tensor, weights: Tensor | None) -> Iterator[tuple[Tensor, int]]:
    """As `farthest_point`, from the cosines of all pairs."""
    unit = unit_rows(features)
    cosines = unit @ unit.T
    weight = None if weights is None else usable(weights)
    covered = torch.zeros(len(unit), device=unit.device)
    for pick in order.tolist():
        yield values(coverage_gains(cosines, covered), weight, "product").float(), pick
        covered = torch.maximum(covered, cosines[pick])


def residual(order: Tensor, features: Tensor, weights: Tensor | None) -> Iterator[tuple[Tensor, int]]:
    """As `dpp`, with values relative to the largest energy."""
    rows = features.double()
    energy = rows.square().sum(1)
    weight = torch.ones_like(energy) if weights is None else usable(weights).double()
    for pick in order.tolist():
        left = rows.square().sum(1)
        gain = torch.where(left > EXHAUSTED * energy, weight * left, 0) / energy.max()
        yield gain, pick
        if gain[pick] <= 0:
            return
        direction = rows[pick] / rows[pick].norm()
        rows = rows - (rows @ direction)[:, None] * direction


RULES = {
    "weighted_farthest_point": farthest_point,
    "dpp_map": dpp,
    "facility_location": coverage,
    "residual_pivots": residual,
    "progressive_mmr": mmr,
}


def shortfall(operation: str, order: Tensor, *inputs: Any) -> float:
    """Largest difference between the value of the best row and that of the pick.

    Args:
        operation: Name of a selection operation of `vtprune_kernels`.
        order: `[K]` picks from one group.
        inputs: Arguments of the operation before `offsets`.

    Returns:
        float: 0 for a perfect selection, infinity if a row was picked twice.
    """
    if len(order.unique()) < len(order):
        return float("inf")
    taken = torch.zeros(len(inputs[0]), dtype=torch.bool, device=order.device)
    worst, before = torch.zeros([], device=order.device), -1
    for value, pick in RULES[operation](order, *inputs):
        if before >= 0 and before != pick:
            taken[before] = True
        before = pick
        worst = torch.maximum(worst, value.masked_fill(taken, -torch.inf).amax() - value[pick])
    return float(worst)
