# SPDX-License-Identifier: Apache-2.0
"""Products of one row with a block of rows, and lengths of rows, on a GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton import power_of_two

ROWS = 16  # rows of a block


def column_block(width: int) -> int:
    return min(256, power_of_two(width))


@triton.jit
def products(features, row_stride, column_stride, rows, inside, one, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Products of `rows` with the row `one`."""
    at, one = rows.to(tl.int64) * row_stride, one.to(tl.int64) * row_stride
    total = tl.zeros(rows.shape, tl.float32)
    for start in range(0, WIDTH, BLOCK):
        column = start + tl.arange(0, BLOCK)
        other = tl.load(features + one + column * column_stride, mask=column < WIDTH, other=0.0).to(tl.float32)
        mask = inside[:, None] & (column < WIDTH)[None, :]
        mine = tl.load(features + at[:, None] + column[None, :] * column_stride, mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(mine * other[None, :], 1)
    return total


@triton.jit
def _lengths(
    features, row_stride, column_stride, result, total, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < total
    at = rows.to(tl.int64) * row_stride
    squares = tl.zeros([ROWS], tl.float32)
    for start in range(0, WIDTH, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = inside[:, None] & (column < WIDTH)[None, :]
        mine = tl.load(features + at[:, None] + column[None, :] * column_stride, mask=mask, other=0.0).to(tl.float32)
        squares += tl.sum(mine * mine, 1)
    tl.store(result + rows, tl.sqrt(squares), mask=inside)


def lengths(features: Tensor) -> Tensor:
    """Lengths `[M]` float32 of the rows `[M, D]`; not finite for rows that are not."""
    result = torch.empty(len(features), device=features.device)
    if len(features):
        _lengths[(-(-len(features) // ROWS),)](
            features, *features.stride(), result, len(features), WIDTH=features.shape[1],
            BLOCK=column_block(features.shape[1]), ROWS=ROWS,
        )  # fmt: skip
    return result


def factors(length: Tensor, eps: float = 1e-6) -> Tensor:
    """Inverse lengths, zero for rows that are not finite."""
    return torch.where(torch.isfinite(length), 1 / length.clamp_min(eps), 0.0)


def decode(best: Tensor, offsets: Tensor, limit: Tensor) -> Tensor:
    """Row numbers `[S, max_budget]` from keys of `rank_key`, -1 beyond each group's `limit`."""
    rows = offsets[:-1, None] + 0x7FFFFFFF - (best & 0x7FFFFFFF)
    return torch.where(torch.arange(best.shape[1], device=best.device) < limit[:, None], rows, -1)
