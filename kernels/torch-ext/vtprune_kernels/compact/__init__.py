# SPDX-License-Identifier: Apache-2.0
"""Gathers the surviving columns of several tensors with one index."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._dispatch import on_gpu, triton_source
from .vectorized import compact as _vectorized


def compact(tensors: Sequence[Tensor], index: Tensor, padded: bool = True) -> list[Tensor]:
    """Gathers columns `index` of dimension 1 from every tensor, bit by bit.

    Args:
        tensors: Tensors `[B, T, ...]` of any dtype and strides (a transposed view of a cache, say).
        index: `[B, K]` int64 columns, repeated ones too; negative entries are padding and give zeros.
        padded: False promises that there are none, which then is not looked up.

    Returns:
        list[Tensor]: `[B, K, ...]` each, in the dtype of its source, and differentiable: a column's gradient is the sum
        over the places that it was gathered to.
    """
    # A kernel leaves no trace for autograd; who asks for gradients gets PyTorch's own gather.
    learning = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if on_gpu(index) and not learning:
        return triton_source("compact")(tensors, index)
    return _vectorized(tensors, index, padded)


__all__ = ["compact"]
