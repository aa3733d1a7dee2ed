# SPDX-License-Identifier: Apache-2.0
"""Gathers kept columns of several tensors with one index."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._dispatch import on_gpu, triton_source
from .vectorized import compact as _vectorized


def compact(tensors: Sequence[Tensor], index: Tensor, padded: bool = True) -> list[Tensor]:
    """Gathers columns `index` of dimension 1 from every tensor, bit for bit.

    Args:
        tensors: Tensors `[B, T, ...]` of any dtype and strides, such as transposed views of a cache.
        index: `[B, K]` int64 columns, which may repeat; negative entries are padding and give zeros.
        padded: False asserts that there is no padding, which saves a check.

    Returns:
        list[Tensor]: `[B, K, ...]` each, in the dtype of its source, and differentiable: a column's gradient is the sum
        over the places that it was gathered to.
    """
    # The Triton kernel has no backward pass, so tensors that require gradients use PyTorch's gather.
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if on_gpu(index) and not needs_grad:
        return triton_source("compact")(tensors, index)
    return _vectorized(tensors, index, padded)


__all__ = ["compact"]
