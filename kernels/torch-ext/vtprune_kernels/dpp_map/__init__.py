# SPDX-License-Identifier: Apache-2.0
"""Greedy MAP of a conditional determinantal point process (CDPruner, arXiv 2506.10967, section 3.3)."""

from __future__ import annotations

from torch import Tensor

from .._dispatch import on_gpu, triton_source
from .vectorized import dpp_map as _vectorized


def dpp_map(
    features: Tensor,
    relevance: Tensor,
    offsets: Tensor,
    budgets: Tensor,
    max_budget: int | None = None,
    max_length: int | None = None,
) -> Tensor:
    """Selects rows that greedily maximize the determinant of `rel_i * cos_ij * rel_j` over the selected rows.

    Rows whose remaining gain is only rounding (below 1e-6 of their own variance, where the published code divides by
    the root of a number that may be negative) come last, by descending relevance.

    Args:
        features: `[M, D]` float; only directions count.
        relevance: `[M]` float weights of the rows.
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
        return triton_source("dpp_map")(features, relevance, offsets, budgets, max_budget, max_length)
    return _vectorized(features, relevance, offsets, budgets, max_budget)


__all__ = ["dpp_map"]
