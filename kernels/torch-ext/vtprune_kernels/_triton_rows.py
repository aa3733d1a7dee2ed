# SPDX-License-Identifier: Apache-2.0
"""Products of one row with a block of rows, and norms of rows, on a GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton import power_of_two

ROWS = 16  # rows per block


def column_block(width: int) -> int:
    return min(256, power_of_two(width))


@triton.jit
def products(x_ptr, stride_xm, stride_xd, rows, row_mask, pivot, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Products of `rows` with the row `pivot`."""
    row_offs, pivot = rows.to(tl.int64) * stride_xm, pivot.to(tl.int64) * stride_xm
    acc = tl.zeros(rows.shape, tl.float32)
    for start_d in range(0, D, BLOCK_D):
        offs_d = start_d + tl.arange(0, BLOCK_D)
        pivot_x = tl.load(x_ptr + pivot + offs_d * stride_xd, mask=offs_d < D, other=0.0).to(tl.float32)
        mask = row_mask[:, None] & (offs_d < D)[None, :]
        x = tl.load(x_ptr + row_offs[:, None] + offs_d[None, :] * stride_xd, mask=mask, other=0.0).to(tl.float32)
        acc += tl.sum(x * pivot_x[None, :], 1)
    return acc


@triton.jit
def _lengths(
    x_ptr, stride_xm, stride_xd, out_ptr, n_rows, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < n_rows
    row_offs = rows.to(tl.int64) * stride_xm
    sum_sq = tl.zeros([BLOCK_M], tl.float32)
    for start_d in range(0, D, BLOCK_D):
        offs_d = start_d + tl.arange(0, BLOCK_D)
        mask = row_mask[:, None] & (offs_d < D)[None, :]
        x = tl.load(x_ptr + row_offs[:, None] + offs_d[None, :] * stride_xd, mask=mask, other=0.0).to(tl.float32)
        sum_sq += tl.sum(x * x, 1)
    tl.store(out_ptr + rows, tl.sqrt(sum_sq), mask=row_mask)


def lengths(features: Tensor) -> Tensor:
    """L2 norms `[M]` float32 of the rows `[M, D]`; not finite for rows that are not."""
    result = torch.empty(len(features), device=features.device, dtype=torch.float32)
    if len(features):
        _lengths[(-(-len(features) // ROWS),)](
            features, *features.stride(), result, len(features), D=features.shape[1],
            BLOCK_D=column_block(features.shape[1]), BLOCK_M=ROWS,
        )  # fmt: skip
    return result


def rows_of(keys: Tensor) -> Tensor:
    """Rows of keys of `rank_key`, counted in their groups."""
    return 0x7FFFFFFF - (keys & 0x7FFFFFFF)


def picks(rows: Tensor, offsets: Tensor, limit: Tensor) -> Tensor:
    """Row numbers `[S, max_budget]` from those counted in each group, -1 beyond each group's `limit`."""
    return torch.where(torch.arange(rows.shape[1], device=rows.device) < limit[:, None], offsets[:-1, None] + rows, -1)
