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
    """Chooses rows that cover their group: every row should have a chosen row that points in its direction.

    With `m_j` the largest cosine of row j to a chosen row, 0 at first, the gain of row i is
    `sum_j max(0, cos_ij - m_j)`. Every pick has the largest `gain_i * weight_i`, or the largest `gain_i + weight_i`.
    Without weights the picks maximize `sum_j m_j` greedily, which reaches at least `1 - 1/e` of the best value.
    Cosines are rounded to 1/65536, and differences of one such step count as 0: rows that are worth the same tie, and
    rounding does not rank copies of rows that are already chosen.

    Args:
        features: `[M, D]` float; only directions count. A row that is zero or not finite covers nothing.
        weights: `[M]` float or None; negative numbers and those that are not finite count as 0.
        offsets: `[S + 1]` int64 offsets of the groups.
        budgets: `[S]` int64 rows to choose from each group.
        max_budget: Columns of the result, `max(budgets)` or more; by default it is read from `budgets`, which waits for
            their device.
        max_length: Rows of the longest group, or more; by default it is read from `offsets` in the same way. Only a GPU
            needs it.
        combine: Whether gain and weight are multiplied or added.

    Returns:
        Tensor: `[S, max_budget]` int64 row numbers in the order of choice, padded with -1. Ties: the smaller row.
    """
    if on_gpu(features):
        return triton_source("facility_location")(features, weights, offsets, budgets, max_budget, max_length, combine)
    return _vectorized(features, weights, offsets, budgets, max_budget, max_length, combine)


__all__ = ["facility_location"]
