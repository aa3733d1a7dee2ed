# SPDX-License-Identifier: Apache-2.0
"""Products of all pairs of rows of a group, in tiles on the tensor cores of a GPU.

A greedy selection needs the products of one row at a time. If the matrix of all pairs of a group fits into
`MATRIX_BYTES`, it is computed first, and one program makes all picks of the group: a pick reads one row of the matrix
(a few kilobytes from cache) instead of all features, and needs no launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton import WIDEN

MATRIX_BYTES = 60_000_000  # within the 64 MB that an operation may allocate


@triton.jit
def tile_of_products(
    x_ptr, row_offs, row_mask, col_offs, col_mask, stride_xd,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Products `[BLOCK_N, BLOCK_N]`, float32, of the rows of `x_ptr` at the offsets `row_offs` and `col_offs`."""
    acc = tl.zeros([BLOCK_N, BLOCK_N], tl.float32)
    for start_d in range(0, D, BLOCK_D):
        offs_d = start_d + tl.arange(0, BLOCK_D)
        d_mask = offs_d < D
        offs = row_offs[:, None] + offs_d[None, :] * stride_xd
        a = tl.load(x_ptr + offs, mask=row_mask[:, None] & d_mask[None, :], other=0.0)
        offs = col_offs[None, :] + offs_d[:, None] * stride_xd
        b = tl.load(x_ptr + offs, mask=col_mask[None, :] & d_mask[:, None], other=0.0)
        if WIDEN:
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["first_group"])
def _pairs(
    x_ptr, stride_xm, stride_xd, factor_ptr, matrix_ptr, nearest_ptr, offsets_ptr, first_group, side,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, STORE: tl.constexpr, NEAREST: tl.constexpr,
):  # fmt: skip
    """Computes one tile of the scaled products of a group's rows, and its transpose.

    `STORE` writes both; `NEAREST` updates the minimum distance of each row to another row.
    """
    n_tiles = tl.num_programs(0)
    pid_m, pid_n = tl.swizzle2d(tl.program_id(0), tl.program_id(1), n_tiles, n_tiles, 8)
    group = first_group + tl.program_id(2)
    start, stop = tl.load(offsets_ptr + group), tl.load(offsets_ptr + group + 1)
    if (pid_n < pid_m) | (start + pid_n * BLOCK_N >= stop):
        return
    rows, cols = pid_m * BLOCK_N + tl.arange(0, BLOCK_N), pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask, col_mask = start + rows < stop, start + cols < stop
    row_offs, col_offs = (start + rows).to(tl.int64) * stride_xm, (start + cols).to(tl.int64) * stride_xm
    acc = tile_of_products(x_ptr, row_offs, row_mask, col_offs, col_mask, stride_xd, D, BLOCK_D, BLOCK_N)
    scale = tl.load(factor_ptr + start + rows, mask=row_mask, other=0.0)[:, None]
    scale = scale * tl.load(factor_ptr + start + cols, mask=col_mask, other=0.0)[None, :]
    acc = tl.where(scale == 0, 0.0, acc * scale)
    mask = row_mask[:, None] & col_mask[None, :]
    if STORE:
        matrix_ptr += tl.program_id(2).to(tl.int64) * side * side
        tl.store(matrix_ptr + rows[:, None] * side + cols[None, :], acc, mask=mask)
        if pid_m < pid_n:
            mirror_ptrs = matrix_ptr + cols[:, None] * side + rows[None, :]
            tl.store(mirror_ptrs, tl.trans(acc), mask=col_mask[:, None] & row_mask[None, :])
    if NEAREST:
        # Not negative, because only the bits of non-negative floats compare like integers.
        distance = tl.where(1 - acc > 1e-6, 1 - acc, 0.0)  # copies of a row, whose cosine is 1 up to rounding, are at 0
        distance = tl.where(mask & (rows[:, None] != cols[None, :]), distance, float("inf"))
        tl.atomic_min(nearest_ptr + start + rows, tl.min(distance, 1).to(tl.int32, bitcast=True), mask=row_mask)
        if pid_m < pid_n:
            tl.atomic_min(nearest_ptr + start + cols, tl.min(distance, 0).to(tl.int32, bitcast=True), mask=col_mask)


def side_of(max_length: int) -> int:
    """Side of a matrix of all pairs: a multiple of 16, so that rows are aligned for vectorized loads."""
    return -(-max_length // 16) * 16


def groups_at_once(max_length: int, groups: int, more: int = 0) -> int:
    """Number of groups whose matrices, with `more` extra rows each, fit into `MATRIX_BYTES`; 0 if none does."""
    return min(groups, MATRIX_BYTES // (4 * side_of(max_length) * (side_of(max_length) + more)))


def pairs(
    features: Tensor,
    factor: Tensor,
    offsets: Tensor,
    max_length: int,
    first: int,
    groups: int,
    matrix: Tensor | None,
    nearest: Tensor | None,
) -> None:
    """Computes the products `factor_i factor_j <x_i, x_j>` of all pairs of rows in the same group.

    Args:
        features: `[M, D]` float; products of half-precision rows are summed in float32.
        factor: `[M]` float32; products with a factor of 0 are 0, even if the row is not finite.
        offsets: `[S + 1]` int64 offsets of the groups, on the device.
        max_length: Length of the longest group, or more.
        first, groups: The first group, and the number of groups.
        matrix: `[groups, side, side]` float32 output of the products; not written beyond a group's rows.
        nearest: `[M]` float32 output, initially infinite: `1 - product` with the nearest other row, at least 0.
    """
    half = features.element_size() == 2
    tile, block = (128, 64) if half else (64, 32)
    tiles = triton.cdiv(max_length, tile)
    _pairs[(tiles, tiles, groups)](
        features, *features.stride(), factor, factor if matrix is None else matrix,
        factor if nearest is None else nearest.view(torch.int32), offsets, first,
        0 if matrix is None else matrix.shape[1], D=features.shape[1],
        BLOCK_D=block, BLOCK_N=tile, STORE=matrix is not None, NEAREST=nearest is not None, num_warps=8 if half else 4,
    )  # fmt: skip
