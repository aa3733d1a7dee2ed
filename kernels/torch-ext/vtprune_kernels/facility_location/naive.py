# SPDX-License-Identifier: Apache-2.0
"""Greedy facility location, with or without weights: the specification, which evaluates all pairs at every pick."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import threshold

from .._ragged import empty_order, groups, self_cosine, unit_rows

GRID = 2097152  # steps in a cosine of 1; sums of steps are exact, so that equal gains tie in any order of summation


def usable(weights: Tensor) -> Tensor:
    """Weights as float32; 0 for those that are negative or not finite."""
    return torch.nan_to_num(weights.float(), nan=0.0, posinf=0.0, neginf=0.0).clamp_min(0)


def steps(cosines: Tensor) -> Tensor:
    """Rounds cosines to integer numbers of steps, as float32, in place."""
    return cosines.mul_(GRID).round_()


def symmetric(block: Tensor, own: Tensor) -> Tensor:
    """Symmetric matrix `[n, n]` from the upper triangle of a block, with `own` `[n]` on the diagonal."""
    upper = block.triu(1)
    return upper + upper.T + torch.diag(own)


def gains(cosines: Tensor, covered: Tensor) -> Tensor:
    """Increase `[r]` float64 of the coverage `[n]` by rows with cosines `[r, n]`, all in steps."""
    return threshold(cosines - covered, 1.0, 0.0).sum(1, dtype=torch.float64)


def values(gain: Tensor, weight: Tensor | None, combine: Literal["product", "sum"]) -> Tensor:
    """Values `[r]` float32 of rows from their gain in steps and their weight."""
    gain = gain / GRID
    if weight is not None:
        gain = gain * weight if combine == "product" else gain + weight
    return gain.float()


def facility_location(
    features: Tensor,
    weights: Tensor | None,
    offsets: Tensor,
    budgets: Tensor,
    max_budget: int | None = None,
    combine: Literal["product", "sum"] = "product",
) -> Tensor:
    """See `vtprune_kernels.facility_location`."""
    order = empty_order(budgets, features.device, max_budget)
    for number, (start, stop, budget) in enumerate(groups(offsets, budgets)):
        unit, own = unit_rows(features[start:stop]), self_cosine(features[start:stop].float().norm(dim=1))
        cosines = steps(symmetric(unit @ unit.T, own))  # [n, n]
        weight = None if weights is None else usable(weights[start:stop])
        covered = torch.zeros(stop - start, device=features.device, dtype=torch.float32)
        free = torch.ones(stop - start, dtype=torch.bool, device=features.device)
        for step in range(budget):
            value = values(gains(cosines, covered), weight, combine).masked_fill(~free, -torch.inf)
            best = int(value.argmax())
            order[number, step] = start + best
            free[best] = False
            covered = torch.maximum(covered, cosines[best])
    return order
