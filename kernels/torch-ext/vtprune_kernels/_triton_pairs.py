# SPDX-License-Identifier: Apache-2.0
"""Products of all pairs of rows of a group, in tiles on the matrix cores of a GPU.

A sequential rule needs the products of one row at a time. If the matrix of all pairs of a group fits into
`MATRIX_BYTES`, it is computed first, and one program makes all picks of the group from it: a pick then reads one line
of the matrix, a few kilobytes from the cache, instead of all features, and needs no launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton import WIDEN

MATRIX_BYTES = 60_000_000  # of the 64 MB that an operation may allocate


@triton.jit(do_not_specialize=["first"])
def _pairs(
    features, row_stride, column_stride, factor, matrix, nearest, offsets, first, side,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, STORE: tl.constexpr, NEAREST: tl.constexpr,
):  # fmt: skip
    """One tile of the scaled products of a group's rows, and its mirror image.

    With `STORE` both are written; with `NEAREST` the distance of each row to its nearest other row is lowered.
    """
    tiles = tl.num_programs(0)
    upper, lower = tl.swizzle2d(tl.program_id(0), tl.program_id(1), tiles, tiles, 8)
    group = first + tl.program_id(2)
    start, stop = tl.load(offsets + group), tl.load(offsets + group + 1)
    if (lower < upper) | (start + lower * TILE >= stop):
        return
    mine, theirs = upper * TILE + tl.arange(0, TILE), lower * TILE + tl.arange(0, TILE)
    inside, known = start + mine < stop, start + theirs < stop
    at, there = (start + mine).to(tl.int64) * row_stride, (start + theirs).to(tl.int64) * row_stride
    total = tl.zeros([TILE, TILE], tl.float32)
    for part in range(0, WIDTH, BLOCK):
        column = part + tl.arange(0, BLOCK)
        valid = column < WIDTH
        place = at[:, None] + column[None, :] * column_stride
        a = tl.load(features + place, mask=inside[:, None] & valid[None, :], other=0.0)
        place = there[None, :] + column[:, None] * column_stride
        b = tl.load(features + place, mask=known[None, :] & valid[:, None], other=0.0)
        if WIDEN:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision="ieee")
    scale = tl.load(factor + start + mine, mask=inside, other=0.0)[:, None]
    scale = scale * tl.load(factor + start + theirs, mask=known, other=0.0)[None, :]
    total = tl.where(scale == 0, 0.0, total * scale)
    both = inside[:, None] & known[None, :]
    if STORE:
        matrix += tl.program_id(2).to(tl.int64) * side * side
        tl.store(matrix + mine[:, None] * side + theirs[None, :], total, mask=both)
        if upper < lower:
            mirror = matrix + theirs[:, None] * side + mine[None, :]
            tl.store(mirror, tl.trans(total), mask=known[:, None] & inside[None, :])
    if NEAREST:
        # Clamped at 0, because only the bits of non-negative floats compare like integers.
        distance = tl.where(both & (mine[:, None] != theirs[None, :]), tl.maximum(1 - total, 0.0), float("inf"))
        tl.atomic_min(nearest + start + mine, tl.min(distance, 1).to(tl.int32, bitcast=True), mask=inside)
        if upper < lower:
            tl.atomic_min(nearest + start + theirs, tl.min(distance, 0).to(tl.int32, bitcast=True), mask=known)


def side_of(max_length: int) -> int:
    """Side of a matrix of all pairs: a multiple of 16, so that its lines are aligned and read in long words."""
    return -(-max_length // 16) * 16


def groups_at_once(max_length: int, groups: int, more: int = 0) -> int:
    """Number of groups whose matrices of all pairs, with `more` rows each, fit into memory together; 0 if none does."""
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
        nearest: `[M]` float32 output, infinite at first, of `1 - product` with the nearest other row, at least 0.
    """
    half = features.element_size() == 2
    tile, block = (128, 64) if half else (64, 32)
    tiles = triton.cdiv(max_length, tile)
    _pairs[(tiles, tiles, groups)](
        features, *features.stride(), factor, factor if matrix is None else matrix,
        factor if nearest is None else nearest.view(torch.int32), offsets, first,
        0 if matrix is None else matrix.shape[1], WIDTH=features.shape[1],
        BLOCK=block, TILE=tile, STORE=matrix is not None, NEAREST=nearest is not None, num_warps=8 if half else 4,
    )  # fmt: skip
