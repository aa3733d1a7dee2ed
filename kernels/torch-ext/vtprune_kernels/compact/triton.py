# SPDX-License-Identifier: Apache-2.0
"""Gathering of kept columns of several tensors on a GPU, in one launch."""

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
    sources, results, index, kept, index_batch, index_column, batches, columns, outers, inners, sizes, lengths,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Copies one kept column of every tensor; its inner dimensions are flattened to two, `[outer, inner]`."""
    place = tl.program_id(0)
    batch, slot = place // kept, place % kept
    column = tl.load(index + batch.to(tl.int64) * index_batch + slot.to(tl.int64) * index_column)
    for number in tl.static_range(len(sources)):
        size, length = sizes[number], lengths[number]
        start = sources[number] + batch.to(tl.int64) * batches[number] + column * columns[number]
        for first in range(tl.program_id(1) * BLOCK, size, tl.num_programs(1) * BLOCK):
            at = first + tl.arange(0, BLOCK)
            inside = at < size
            where = (at // length).to(tl.int64) * outers[number] + (at % length).to(tl.int64) * inners[number]
            value = tl.load(start + where, mask=inside & (column >= 0), other=0)
            tl.store(results[number] + place.to(tl.int64) * size + at, value, mask=inside)


def _as_integers(tensor: Tensor) -> Tensor:
    """Views a tensor as integers of the same size, because Triton has no bool and complex dtypes."""
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
