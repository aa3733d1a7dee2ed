# SPDX-License-Identifier: Apache-2.0
"""Rows with the largest energy outside the span of those already selected (ResPrune, arXiv 2603.21105)."""

from __future__ import annotations

from torch import Tensor

from .._dispatch import on_gpu, triton_source
from .energy import residual_energy
from .vectorized import residual_pivots as _vectorized


def residual_pivots(
    features: Tensor,
    weights: Tensor | None,
    offsets: Tensor,
    budgets: Tensor,
    max_budget: int | None = None,
    max_length: int | None = None,
) -> Tensor:
    """Selects rows one by one, each with the largest `weight * |residual|^2`.

    The residual of a row is its difference from the best approximation by the rows selected before. Without weights the
    picks are the pivots of a QR decomposition of the transposed features. When no row has more than 1e-10 of the
    largest energy of a row left, the rest follows by descending `weight * |row|^2`. On a GPU, where residuals are
    computed in float32, a row counts as explained, and comes last, if less than 1e-6 of its own energy is left.

    Args:
        features: `[M, D]` float. Rows that are zero or not finite come last.
        weights: `[M]` float or None; negative numbers and those that are not finite count as 0.
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
        return triton_source("residual_pivots")(features, weights, offsets, budgets, max_budget, max_length)
    return _vectorized(features, weights, offsets, budgets, max_budget)


__all__ = ["residual_energy", "residual_pivots"]
