# SPDX-License-Identifier: Apache-2.0
"""Greedy facility location, with or without weights: the specification, which evaluates all pairs at every pick."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import threshold

from .._ragged import empty_order, factors, groups

_GRID = 2**24  # steps in a cosine of 1: float32 holds all multiples of a step up to 1
NOISE = 5e-7  # differences of cosines up to this are rounding of the features
COPY = 1e-6  # rows whose cosine is 1 up to this are copies, whose features may differ by rounding
TIE = 1e-6  # copies tie if their values differ by this share, or by this times the root of the number of rows


def inverse_lengths(rows: Tensor) -> Tensor:
    """Inverse lengths `[n]` float64 of float32 rows; 0 for rows that are not finite."""
    return factors(torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64))


def on_grid(products: Tensor, row_factors: Tensor, column_factors: Tensor) -> Tensor:
    """Cosines `[r, n]` float32 from products and inverse lengths in float64, rounded to steps of 2^-24.

    Their differences above 0 are exact in float32, and so are sums of these in float64: equal gains are equal.
    """
    cosines = products.mul_(row_factors[:, None]).mul_(column_factors)
    return cosines.mul_(_GRID).round_().div_(_GRID).float()


def usable(weights: Tensor) -> Tensor:
    """Weights as float32; 0 for those that are negative or not finite."""
    return torch.nan_to_num(weights.float(), nan=0.0, posinf=0.0, neginf=0.0).clamp_min(0)


def gains(cosines: Tensor, covered: Tensor) -> Tensor:
    """Increase `[r]` float64 of the coverage `[n]` by rows with cosines `[r, n]`."""
    return threshold(cosines - covered, NOISE, 0.0).sum(1, dtype=torch.float64)


def values(gain: Tensor, weight: Tensor | None, combine: Literal["product", "sum"]) -> Tensor:
    """Values `[r]` float64 of rows from their gain and their weight."""
    if weight is None:
        return gain
    return gain * weight if combine == "product" else gain + weight


def copies(cosines: Tensor) -> Tensor:
    """Whether rows are copies of one another up to rounding, from their cosines."""
    return cosines >= 1 - COPY


def least_tied(value: float, weight: float, length: int, combine: Literal["product", "sum"]) -> tuple[float, float]:
    """Smallest value of any row, and of a copy of the best row, that ties with the best row's `value`.

    Rounding of the features, which differs between a row in a batch and alone, must not decide. It changes the gains of
    copies, sums of up to `length` terms, by more than the difference of two rows that are each the closest to the
    other: the last terms of their gains are the same.
    """
    scale = weight if combine == "product" else 1.0
    return value - NOISE * scale, value - TIE * (abs(value) + math.sqrt(length) * scale)


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
        rows = features[start:stop].float()
        factor = inverse_lengths(rows)
        rows = torch.where(factor[:, None] > 0, rows, 0.0).double()
        cosines = on_grid(rows @ rows.T, factor, factor)  # [n, n]
        weight = None if weights is None else usable(weights[start:stop])
        covered = torch.zeros(stop - start, device=features.device, dtype=torch.float32)
        free = torch.ones(stop - start, dtype=torch.bool, device=features.device)
        for step in range(budget):
            value = values(gains(cosines, covered), weight, combine).masked_fill(~free, -torch.inf)
            best = int(value.argmax())  # argmax returns the first of equals
            own = 1.0 if weight is None else float(weight[best])
            any_row, a_copy = least_tied(float(value[best]), own, len(value), combine)
            tied = (value >= any_row) | (copies(cosines[best]) & (value >= a_copy))
            best = int(tied.to(torch.int8).argmax())
            order[number, step] = start + best
            free[best] = False
            covered = torch.maximum(covered, cosines[best])
    return order
