# SPDX-License-Identifier: Apache-2.0
"""Gathering of kept columns of several tensors in PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def compact(tensors: Sequence[Tensor], index: Tensor, padded: bool = True) -> list[Tensor]:
    """See `vtprune_kernels.compact`."""
    has_padding = bool((index < 0).any()) if padded else False
    padding, index = (index < 0, index.clamp_min(0)) if has_padding else (None, index)
    alone = index[0] if len(index) == 1 else None
    samples = torch.arange(len(index), device=index.device)[:, None] if alone is None else None
    results = []
    for tensor in tensors:
        # Indexing reads any strides, so that views of a cache and expanded rotations are not copied first.
        result = tensor[samples, index] if alone is None else tensor.index_select(1, alone)  # [B, K, ...]
        if padding is not None:
            result[padding] = 0  # in place, but of a new tensor, so that autograd allows it
        results.append(result)
    return results
