# SPDX-License-Identifier: Apache-2.0
"""Residual selection as greedy MAP of a determinantal point process.

The residual energy of a row is its conditional variance in the kernel of all products, so QR with column pivoting is
pivoted Cholesky of that kernel, and weights scale the rows. The selection is that of `dpp_map`, including lazy
evaluation, with lengths as relevance.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._ragged import segment_maximum
from ..dpp_map.vectorized import dpp_map
from ..facility_location.naive import usable


def relevance(features: Tensor, length: Tensor, weights: Tensor | None, offsets: Tensor) -> Tensor:
    """Factors `[M]` that turn cosines into products of weighted rows; at most 1 without weights.

    Args:
        features: `[M, D]`.
        length: `[M]` float32 lengths of the rows.
        weights: `[M]` or None.
        offsets: `[S + 1]` offsets; each group is scaled by its longest row, so that squares stay in range.
    """
    length = torch.nan_to_num(length, nan=0.0, posinf=0.0)
    scaled = length / segment_maximum(length, offsets).clamp_min(torch.finfo(torch.float32).tiny)
    return scaled if weights is None else scaled * usable(weights).sqrt()


def residual_pivots(
    features: Tensor,
    weights: Tensor | None,
    offsets: Tensor,
    budgets: Tensor,
    max_budget: int | None = None,
    max_length: int | None = None,
) -> Tensor:
    """See `vtprune_kernels.residual_pivots`."""
    length = torch.linalg.vector_norm(features.float(), dim=1)
    return dpp_map(features, relevance(features, length, weights, offsets), offsets, budgets, max_budget)
