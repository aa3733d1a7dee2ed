# SPDX-License-Identifier: Apache-2.0
"""Greedy facility location, with or without weights: the specification, which evaluates all pairs at every pick."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import threshold

from .._ragged import empty_order, groups, unit_rows

_NOISE = 4e-7  # differences of cosines up to this are rounding
_TIE = 3e-7  # gains that differ by this times the root of the number of rows, or less, tie


def usable(weights: Tensor) -> Tensor:
    """Weights as float32; 0 for those that are negative or not finite."""
    return torch.nan_to_num(weights.float(), nan=0.0, posinf=0.0, neginf=0.0).clamp_min(0)


def gains(cosines: Tensor, covered: Tensor) -> Tensor:
    """Increase `[r]` float64 of the coverage `[n]` by rows with cosines `[r, n]`."""
    return threshold(cosines - covered, _NOISE, 0.0).sum(1, dtype=torch.float64)


def values(gain: Tensor, weight: Tensor | None, combine: Literal["product", "sum"]) -> Tensor:
    """Values `[r]` float64 of rows from their gain and their weight."""
    if weight is None:
        return gain
    return gain * weight if combine == "product" else gain + weight


def ties(covered: Tensor, weight: Tensor | None, combine: Literal["product", "sum"]) -> Tensor:
    """Differences `[n]` float64 from the value of each row up to which lower values tie with it."""
    tie = torch.full_like(covered, _TIE * math.sqrt(len(covered)), dtype=torch.float64)
    return tie if weight is None or combine == "sum" else tie * weight


def first_best(value: Tensor, tie: Tensor) -> tuple[int, float]:
    """The first row whose value `[r]` ties with the largest, and the smallest value that does."""
    best = int(value.argmax())
    least = float(value[best] - tie[best])
    return int((value >= least).to(torch.int8).argmax()), least  # argmax returns the first of equals


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
        unit = unit_rows(features[start:stop])
        cosines = unit @ unit.T  # [n, n]
        weight = None if weights is None else usable(weights[start:stop])
        covered = torch.zeros(stop - start, device=features.device, dtype=torch.float32)
        tie = ties(covered, weight, combine)
        free = torch.ones(stop - start, dtype=torch.bool, device=features.device)
        for step in range(budget):
            value = values(gains(cosines, covered), weight, combine).masked_fill(~free, -torch.inf)
            best, _ = first_best(value, tie)
            order[number, step] = start + best
            free[best] = False
            covered = torch.maximum(covered, cosines[best])
    return order
