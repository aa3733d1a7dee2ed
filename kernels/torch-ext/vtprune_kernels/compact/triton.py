# SPDX-License-Identifier: Apache-2.0
"""Gathers the kept columns of several tensors on a GPU in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

_TOGETHER, _BLOCK = 8, 1024  # tensors per launch, elements per copy
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit
def _gather(
    source_ptrs, out_ptrs, index_ptr, n_kept, stride_ib, stride_ik, strides_batch, strides_column, strides_outer,
    strides_inner, sizes, inner_sizes,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Copies one kept column of every tensor; inner dimensions are flattened to `[outer, inner]`."""
    pid = tl.program_id(0)
    batch, slot = pid // n_kept, pid % n_kept
    column = tl.load(index_ptr + batch.to(tl.int64) * stride_ib + slot.to(tl.int64) * stride_ik)
    for i in tl.static_range(len(source_ptrs)):
        size, inner = sizes[i], inner_sizes[i]
        source_ptr = source_ptrs[i] + batch.to(tl.int64) * strides_batch[i] + column * strides_column[i]
        for start in range(tl.program_id(1) * BLOCK, size, tl.num_programs(1) * BLOCK):
            offs = start + tl.arange(0, BLOCK)
            mask = offs < size
            src_offs = (offs // inner).to(tl.int64) * strides_outer[i] + (offs % inner).to(tl.int64) * strides_inner[i]
            value = tl.load(source_ptr + src_offs, mask=mask & (column >= 0), other=0)
            tl.store(out_ptrs[i] + pid.to(tl.int64) * size + offs, value, mask=mask)


def _as_integers(tensor: Tensor) -> Tensor:
    """Views a tensor as integers of the same size, because Triton has no bool or complex dtypes."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor.view(_INTEGERS[tensor.element_size()])


def compact(tensors: Sequence[Tensor], index: Tensor) -> list[Tensor]:
    """See `vtprune_kernels.compact`."""
    batch, kept = index.shape
    results = [tensor.new_empty(index.shape + tensor.shape[2:]) for tensor in tensors]
    todo = []
    for tensor, result in zip(tensors, results, strict=True):
        if result.numel() == 0:
            continue
        source, flat = _as_integers(tensor), _as_integers(result)
        source = source.reshape(*source.shape[:2], *([1] * (4 - source.dim())), *source.shape[2:])
        if source.dim() > 4:
            source = source.flatten(2, -2)  # a view if these dimensions are contiguous
        outer, inner = source.shape[2:]
        todo.append((source, flat, *source.stride(), outer * inner, inner))
    for start in range(0, len(todo), _TOGETHER):
        sources, flats, *numbers = zip(*todo[start : start + _TOGETHER], strict=True)
        blocks = min(64, -(-max(numbers[-2]) // _BLOCK))
        _gather[(batch * kept, blocks)](sources, flats, index, kept, *index.stride(), *numbers, BLOCK=_BLOCK)
    return results
