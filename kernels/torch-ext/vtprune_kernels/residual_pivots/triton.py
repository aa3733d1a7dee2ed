# SPDX-License-Identifier: Apache-2.0
"""Residual selection on a GPU: greedy DPP MAP with the norms of the rows as relevance."""

from __future__ import annotations

from torch import Tensor

from .._ragged import on
from .._triton_rows import lengths
from ..dpp_map.triton import dpp_map
from .vectorized import relevance


def residual_pivots(
    features: Tensor,
    weights: Tensor | None,
    offsets: Tensor,
    budgets: Tensor,
    max_budget: int | None = None,
    max_length: int | None = None,
) -> Tensor:
    """See `vtprune_kernels.residual_pivots`."""
    offsets = on(offsets, features.device)
    factor = relevance(features, lengths(features), weights, offsets)
    return dpp_map(features, factor, offsets, budgets, max_budget, max_length)
