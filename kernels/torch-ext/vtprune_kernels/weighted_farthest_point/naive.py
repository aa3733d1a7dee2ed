# SPDX-License-Identifier: Apache-2.0
"""Farthest-point selection by cosine distance, with or without weights: the specification."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import threshold

from .._ragged import empty_order, finite, groups, unit_rows

COPY = 1e-6  # distance up to which a row is a copy of another, up to rounding


def distances(cosines: Tensor) -> Tensor:
    """`1 - cosine`, 0 for copies of a row."""
    return threshold(1 - cosines, COPY, 0.0)


def weighted_farthest_point(
    features: Tensor, weights: Tensor | None, offsets: Tensor, budgets: Tensor, max_budget: int | None = None
) -> Tensor:
    """See `vtprune_kernels.weighted_farthest_point`."""
    order = empty_order(budgets, features.device, max_budget)
    for number, (start, stop, budget) in enumerate(groups(offsets, budgets)):
        if budget == 0:
            continue
        unit = unit_rows(features[start:stop])
        distance = distances(unit @ unit.T)  # [n, n]
        if weights is None:
            weight = torch.ones(stop - start, device=features.device, dtype=torch.float32)
            nearest_other = distance + torch.diag(torch.full_like(weight, torch.inf))
            value = finite(nearest_other.amin(1))
            first = int(value.argmax())
            partner = int(nearest_other[first].argmin())
            if int(nearest_other[partner].argmin()) == first:  # computed twice; rounding must not decide
                first = min(first, partner)
        else:
            weight = weights[start:stop].float()
            first = int(finite(weight).argmax())
        chosen = [first]
        while len(chosen) < budget:
            value = finite(weight * distance[:, chosen].amin(1))
            value[chosen] = -torch.inf
            chosen.append(int(value.argmax()))
        order[number, :budget] = torch.tensor(chosen, dtype=torch.int64) + start
    return order
