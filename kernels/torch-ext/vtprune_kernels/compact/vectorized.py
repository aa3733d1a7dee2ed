# SPDX-License-Identifier: Apache-2.0
"""Gathering the surviving columns of several tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def compact(tensors: Sequence[Tensor], index: Tensor, padded: bool = True) -> list[Tensor]:
    """See `vtprune_kernels.compact`."""
    empty = bool((index < 0).any()) if padded else False
    gone, index = (index < 0, index.clamp_min(0)) if empty else (None, index)
    samples = torch.arange(len(index), device=index.device)[:, None] if len(index) > 1 else None
    results = []
    for tensor in tensors:
        # Indexing reads any strides, so views of a cache or expanded rotations are not copied first.
        result = tensor.index_select(1, index[0]) if len(index) == 1 else tensor[samples, index]  # [B, K, ...]
        if gone is not None:
            result[gone] = 0  # of a fresh tensor: autograd follows
        results.append(result)
    return results
