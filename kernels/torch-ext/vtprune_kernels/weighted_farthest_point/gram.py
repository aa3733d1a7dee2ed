# SPDX-License-Identifier: Apache-2.0
"""Farthest-point selection in a small group, from a matrix of all distances."""

from __future__ import annotations

import torch
from torch import Tensor

from .._cosine import Cosine
from .._ragged import finite
from .naive import distances


def choose(cosine: Cosine, weight: Tensor | None, budget: int) -> Tensor:
    """Selects rows of one group, returned as `[budget]` int64 in order of selection.

    Args:
        cosine: Cosines of the group's rows.
        weight: `[n]` float32, not negative, or None.
        budget: Number of rows to select, at least 1.
    """
    everything = slice(None)
    distance = distances(cosine(everything))  # [n, n]
    if weight is None:
        first = _most_isolated(distance.fill_diagonal_(torch.inf))
    else:
        first = int(finite(weight).argmax())
        # Since weights are not negative, the weighted distance to the nearest row is the minimum weighted distance.
        distance = finite(distance.mul_(weight))
    distance.fill_diagonal_(-torch.inf)  # a selected row is not selected again
    chosen, value = [first], distance[first].clone()
    while len(chosen) < budget:
        chosen.append(int(value.argmax()))
        torch.minimum(value, distance[chosen[-1]], out=value)
    return torch.tensor(chosen, dtype=torch.int64, device=distance.device)


def _most_isolated(distance: Tensor) -> int:
    """The row whose nearest other row is farthest away, from distances `[n, n]` with an infinite diagonal."""
    first = int(finite(distance.amin(1)).argmax())
    partner = int(distance[first].argmin())
    if int(distance[partner].argmin()) == first:  # their distance is computed twice; rounding must not decide
        first = min(first, partner)
    return first
