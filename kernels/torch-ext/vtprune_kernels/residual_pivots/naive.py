# SPDX-License-Identifier: Apache-2.0
"""Residual selection in float64: the specification, which updates every row at every pick."""

from __future__ import annotations

import torch
from torch import Tensor

from .._ragged import empty_order, groups
from ..facility_location.naive import usable

EXPLAINED = 1e-10  # share of the largest energy of a row; if no row has more left, the selected rows explain all


def fill(energy: Tensor, taken: Tensor, count: int) -> Tensor:
    """The `count` rows with the largest `energy` `[n]` among those not `taken` `[n]`; ties go to the smaller row."""
    return torch.sort(energy.masked_fill(taken, -torch.inf), descending=True, stable=True).indices[:count]


def residual_pivots(
    features: Tensor, weights: Tensor | None, offsets: Tensor, budgets: Tensor, max_budget: int | None = None
) -> Tensor:
    """See `vtprune_kernels.residual_pivots`."""
    order = empty_order(budgets, features.device, max_budget)
    for number, (start, stop, budget) in enumerate(groups(offsets, budgets)):
        rows = features[start:stop].double()
        rows = torch.where(torch.isfinite(rows).all(1, keepdim=True), rows, 0)
        weight = torch.ones(stop - start, dtype=torch.float32) if weights is None else usable(weights[start:stop])
        weight, energy = weight.to(rows), rows.square().sum(1)
        residual = rows.clone()
        free = torch.ones(stop - start, dtype=torch.bool, device=features.device)
        for step in range(budget):
            left = residual.square().sum(1)
            gain = (weight * left).masked_fill(~free, -torch.inf)
            best = int(gain.argmax())
            if gain[best] <= 0 or left[free].max() <= EXPLAINED * energy.max():
                order[number, step:budget] = start + fill(weight * energy, ~free, budget - step)
                break
            order[number, step] = start + best
            free[best] = False
            direction = residual[best] / residual[best].norm()
            for _ in range(2):  # the second pass removes the rounding error of the first
                residual = residual - (residual @ direction)[:, None] * direction
    return order
