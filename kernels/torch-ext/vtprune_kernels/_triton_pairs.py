# SPDX-License-Identifier: Apache-2.0
"""Products of the rows of a group with each other, in tiles on the matrix cores of a GPU.

A sequential rule asks for the products of one row at a time. Where the matrix of all pairs of a group fits into
`MATRIX_BYTES`, it is made at once, and one program makes all picks of the group from it: reading one line of the
matrix costs a few kilobytes from the cache, not all features, and no pick costs a launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton import WIDEN

MATRIX_BYTES = 60_000_000  # of the 64 MB that an operation may take beside its inputs


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
        # Not negative, so that their bits order them.
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
    """Makes the products `factor_i factor_j <x_i, x_j>` of all pairs of rows that share a group.

    Args:
        features: `[M, D]` float; products of half-precision rows are summed in float32.
        factor: `[M]` float32; where it is 0, products are 0 whatever the row holds.
        offsets: `[S + 1]` int64 offsets of the groups, on the device.
        max_length: Rows of the longest group, or more.
        first, groups: The first group and the number of those that are meant.
        matrix: `[groups, side, side]` float32 that takes the products; beyond a group's rows it is not written.
        nearest: `[M]` float32, infinite at first, that takes `1 - product` with the nearest other row, 0 at least.
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
