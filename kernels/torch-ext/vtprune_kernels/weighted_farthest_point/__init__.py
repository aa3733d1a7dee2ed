# SPDX-License-Identifier: Apache-2.0
"""Farthest-point choice by cosine distance (DivPrune, arXiv 2503.02175; ZOO-Prune, arXiv 2509.24837)."""

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
    """Chooses rows that are far from all rows chosen before, by `1 - cos`.

    Without weights (DivPrune) the first row is the one whose nearest other row is farthest away, and every further one
    has the largest distance to its nearest chosen row. With weights (ZOO-Prune) the first row has the largest weight,
    and every further one the largest `weight * distance`. A chosen row is never chosen again.

    Args:
        features: `[M, D]` float.
        weights: `[M]` float, not negative for full speed, or None.
        offsets: `[S + 1]` int64 offsets of the groups.
        budgets: `[S]` int64 rows to choose from each group.
        max_budget: Columns of the result, `max(budgets)` or more; by default it is read from `budgets`, which waits for
            their device.
        max_length: Rows of the longest group, or more; by default it is read from `offsets` in the same way. Only a GPU
            needs it.

    Returns:
        Tensor: `[S, max_budget]` int64 row numbers in the order of choice, padded with -1. Ties: the smaller row.
    """
    if on_gpu(features):
        return triton_source("weighted_farthest_point")(features, weights, offsets, budgets, max_budget, max_length)
    return _vectorized(features, weights, offsets, budgets, max_budget)


__all__ = ["weighted_farthest_point"]
