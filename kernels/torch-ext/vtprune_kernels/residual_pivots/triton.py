# SPDX-License-Identifier: Apache-2.0
"""Residual selection on a GPU: the greedy choice of a determinantal point process, with lengths for relevance."""

from __future__ import annotations

from torch import Tensor

from .._ragged import on
from .._triton_rows import lengths
from ..dpp_map.triton import dpp_map
from .vectorised import relevance


def residual_pivots(
    features: Tensor,
    weights: Tensor | None,
    segments: Tensor,
    budgets: Tensor,
    width: int | None = None,
    longest: int | None = None,
) -> Tensor:
    """See `vtprune_kernels.residual_pivots`."""
    segments = on(segments, features.device)
    factor = relevance(features, lengths(features), weights, segments)
    return dpp_map(features, factor, segments, budgets, width, longest)
