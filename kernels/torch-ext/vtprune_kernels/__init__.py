# SPDX-License-Identifier: Apache-2.0
"""Tensor operations for selecting visual tokens, independent of any model.

Every operation is a folder: `naive.py` is its specification, `vectorized.py` the PyTorch and `triton.py` the GPU path.
"""

from __future__ import annotations

from .attention_rows import attention_rows
from .compact import compact
from .dpp_map import dpp_map
from .facility_location import facility_location
from .progressive_mmr import progressive_mmr
from .rank1_relevance import rank1_relevance
from .received_attention import received_attention
from .residual_pivots import residual_pivots
from .transition_variation import transition_variation
from .weighted_farthest_point import weighted_farthest_point

__all__ = [
    "attention_rows",
    "compact",
    "dpp_map",
    "facility_location",
    "progressive_mmr",
    "rank1_relevance",
    "received_attention",
    "residual_pivots",
    "transition_variation",
    "weighted_farthest_point",
]
