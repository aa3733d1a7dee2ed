# SPDX-License-Identifier: Apache-2.0
"""Greedy facility location, weighted by saliency (SCOPE, arXiv 2510.24214, section 3)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from .._dispatch import on_gpu, triton_source
from .vectorized import facility_location as _vectorized


def facility_location(
    features: Tensor,
    weights: Tensor | None,
    offsets: Tensor,
    budgets: Tensor,
    max_budget: int | None = None,
    max_length: int | None = None,
    combine: Literal["product", "sum"] = "product",
) -> Tensor:
    """Selects rows that cover their group: every row should be similar to a selected row.

    With `m_j` the largest cosine of row j to a selected row, 0 at first, the gain of row i is
    `sum_j max(0, cos_ij - m_j)`. Every pick has the largest `gain_i * weight_i`, or the largest `gain_i + weight_i`.
    Without weights the picks maximize `sum_j m_j` greedily, which reaches at least `1 - 1/e` of the best value.
    Differences of cosines up to 5e-7, the rounding of features in float32, count as 0, and values that differ by no
    more tie. Copies of a row, whose rounding may add up over all terms of their gains, tie up to 1e-6. On the host,
    products are summed in float64; on a GPU in float32, and cosines are rounded to 2^-22.

    Args:
        features: `[M, D]` float; only directions count. A row that is zero or not finite covers nothing.
        weights: `[M]` float or None; negative numbers and those that are not finite count as 0.
        offsets: `[S + 1]` int64 offsets of the groups.
        budgets: `[S]` int64 number of rows to select from each group.
        max_budget: Width of the result, at least `max(budgets)`; by default it is read from `budgets`, which
            synchronizes with their device.
        max_length: Length of the longest group, or more; by default it is read from `offsets` in the same way. Only
            used on a GPU.
        combine: Whether gain and weight are multiplied or added.

    Returns:
        Tensor: `[S, max_budget]` int64 row numbers in order of selection, padded with -1. Ties go to the smaller row.
    """
    if on_gpu(features):
        return triton_source("facility_location")(features, weights, offsets, budgets, max_budget, max_length, combine)
    return _vectorized(features, weights, offsets, budgets, max_budget, combine)


__all__ = ["facility_location"]
