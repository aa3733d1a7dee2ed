# SPDX-License-Identifier: Apache-2.0
"""Shared parts of the Triton kernels: blocks of a ragged batch, and sortable keys for deterministic selection."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# The interpreter's `tl.dot` treats the bits of bfloat16 as integers, so inputs are converted to float32 there.
WIDEN = tl.constexpr(bool(triton.knobs.runtime.interpret))


NOTHING = -(1 << 63) + 1  # smaller than every key of `rank_key`; a literal in the kernels


def power_of_two(number: int, least: int = 16) -> int:
    return max(least, triton.next_power_of_2(max(1, number)))


def blocks(offsets: Tensor, total: int, size: int) -> tuple[Tensor, Tensor]:
    """Splits the groups into blocks of at most `size` rows without a device synchronization.

    Returns:
        tuple[Tensor, Tensor]: Group `[P]` of each block (the number of groups if surplus), and its first row `[P]`.
    """
    if len(offsets) == 2:  # a single group needs fewer launches
        first = offsets[0] + torch.arange(0, total, size, device=offsets.device)
        return torch.zeros_like(first), first
    count = -(-offsets.diff() // size)
    ends = count.cumsum(0)
    number = torch.arange(-(-total // size) + len(count), device=offsets.device)
    owner = torch.searchsorted(ends, number, right=True)
    known = owner.clamp_max(len(count) - 1)
    return owner, offsets[known] + (number - (ends - count)[known]) * size


@triton.jit
def ordered(value):
    """Maps float32 to int32 with the same order."""
    bits = value.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def rank_key(value, row):
    """int64 key that orders by value (NaN lowest), then by descending row, so that ties go to the smaller row."""
    lowest: tl.constexpr = -3.4028234663852886e38
    value = tl.where(value == value, tl.minimum(tl.maximum(value, lowest), -lowest), lowest)
    value = tl.where(value == 0, 0.0, value)  # maps -0.0 to 0.0
    return (ordered(value).to(tl.int64) << 32) | (0x7FFFFFFF - row).to(tl.int64)


@triton.jit
def key_row(key):
    """The row of a key of `rank_key`."""
    return 0x7FFFFFFF - (key & 0x7FFFFFFF).to(tl.int32)
