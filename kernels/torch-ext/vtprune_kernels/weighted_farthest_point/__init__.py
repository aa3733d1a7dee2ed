# SPDX-License-Identifier: Apache-2.0
"""Farthest-point selection by cosine distance (DivPrune, arXiv 2503.02175; ZOO-Prune, arXiv 2509.24837)."""

from __future__ import annotations

from torch import Tensor

from .._dispatch import on_gpu, triton_source
from .vectorized import weighted_farthest_point as _vectorized


def weighted_farthest_point(
    features: Tensor,
    weights: Tensor | None,
    offsets: Tensor,
    budgets: Tensor,
    max_budget: int | None = None,
    max_length: int | None = None,
) -> Tensor:
    """Selects rows that are far from all rows selected before, by the distance `1 - cos`.

    Without weights (DivPrune) the first row is the one whose nearest other row is farthest away, and every further one
    has the largest distance to its nearest selected row. With weights (ZOO-Prune) the first row has the largest weight,
    and every further one the largest `weight * distance`. A selected row is never selected again.

    Args:
        features: `[M, D]` float.
        weights: `[M]` float or None; negative weights are slower.
        offsets: `[S + 1]` int64 offsets of the groups.
        budgets: `[S]` int64 number of rows to select from each group.
        max_budget: Width of the result, at least `max(budgets)`; by default it is read from `budgets`, which
            synchronizes with their device.
        max_length: Length of the longest group, or more; by default it is read from `offsets` in the same way. Only
            used on a GPU.

    Returns:
        Tensor: `[S, max_budget]` int64 row numbers in order of selection, padded with -1. Ties go to the smaller row.
    """
    if on_gpu(features):
        return triton_source("weighted_farthest_point")(features, weights, offsets, budgets, max_budget, max_length)
    return _vectorized(features, weights, offsets, budgets, max_budget)


__all__ = ["weighted_farthest_point"]
