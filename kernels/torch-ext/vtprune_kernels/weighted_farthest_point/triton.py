# SPDX-License-Identifier: Apache-2.0
"""Farthest-point choice on a GPU: one launch a pick.

A launch brings the distances of its block of rows up to date with the last pick, and raises the best key of the next
pick to its own: a maximum of integers, the same in every order of execution.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._ragged import output_width
from .._triton import WIDEN, blocks, key_row, rank_key
from .._triton_rows import ROWS, column_block, decode, factors, lengths, products

_NOTHING = -(1 << 63) + 1


@triton.jit
def _isolation(
    features, row_stride, column_stride, factor, owner, first, segments, best, width, pools,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """First pick without weights: the largest distance to the nearest other row."""
    pool = tl.load(owner + tl.program_id(0))
    if pool >= pools:
        return
    start, stop = tl.load(segments + pool), tl.load(segments + pool + 1)
    rows = tl.load(first + tl.program_id(0)) + tl.arange(0, TILE)
    inside = rows < stop
    at, mine = rows.to(tl.int64) * row_stride, tl.load(factor + rows, mask=inside, other=0.0)
    nearest = tl.full([TILE], float("inf"), tl.float32)
    for begin in range(start, stop, TILE):
        others = begin + tl.arange(0, TILE)
        known = others < stop
        there = others.to(tl.int64) * row_stride
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
        scale = mine[:, None] * tl.load(factor + others, mask=known, other=0.0)[None, :]
        distance = 1 - tl.where(scale == 0, 0.0, total * scale)
        other = known[None, :] & (rows[:, None] != others[None, :])
        nearest = tl.minimum(nearest, tl.min(tl.where(other, distance, float("inf")), 1))
    key = tl.where(inside, rank_key(nearest, rows - start), -0x7FFFFFFFFFFFFFFF)
    tl.atomic_max(best + pool * width, tl.max(key, 0))


@triton.jit(do_not_specialize=["width", "step"])
def _pick(
    features, row_stride, column_stride, factor, weights, weight_stride, nearest, owner, first, segments, limit, best,
    width, step, pools, WEIGHTED: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Distances to pick `step - 1`, and the key of pick `step`; with `START` the first pick, by weight alone."""
    pool = tl.load(owner + tl.program_id(0))
    if pool >= pools:
        return
    if step >= tl.load(limit + pool):
        return
    start, stop = tl.load(segments + pool), tl.load(segments + pool + 1)
    rows = tl.load(first + tl.program_id(0)) + tl.arange(0, ROWS)
    inside = rows < stop
    value = tl.full([ROWS], 1.0, tl.float32)
    if WEIGHTED:
        value = tl.load(weights + rows * weight_stride, mask=inside, other=0.0).to(tl.float32)
    free = inside
    if not START:
        one = start + key_row(tl.load(best + pool * width + step - 1))
        scale = tl.load(factor + rows, mask=inside, other=0.0) * tl.load(factor + one)
        total = products(features, row_stride, column_stride, rows, inside, one, WIDTH, BLOCK)
        near = tl.load(nearest + rows, mask=inside, other=0.0)
        near = tl.minimum(near, 1 - tl.where(scale == 0, 0.0, total * scale))
        near = tl.where(rows == one, -float("inf"), near)
        tl.store(nearest + rows, near, mask=inside)
        free = inside & (near > -float("inf"))
        value = value * tl.where(free, near, 0.0)
    key = tl.where(free, rank_key(value, rows - start), -0x7FFFFFFFFFFFFFFF)
    tl.atomic_max(best + pool * width + step, tl.max(key, 0))


def weighted_farthest_point(
    features: Tensor, weights: Tensor | None, segments: Tensor, budgets: Tensor, width: int | None = None
) -> Tensor:
    """See `vtprune_kernels.weighted_farthest_point`."""
    width, device, total = output_width(budgets, width), features.device, len(features)
    segments, budgets = segments.to(device), budgets.to(device)
    limit, pools = torch.minimum(budgets, segments.diff()), len(budgets)
    best = torch.full((pools, width), _NOTHING, dtype=torch.int64, device=device)
    if width and total:
        sizes = {"WIDTH": features.shape[1], "BLOCK": column_block(features.shape[1])}
        rows, factor = (features, *features.stride()), factors(lengths(features))
        nearest = torch.full((total,), torch.inf, device=device)
        owner, first = blocks(segments, total, ROWS)
        weight = (nearest, 1) if weights is None else (weights, weights.stride(0))
        pick = (*rows, factor, *weight, nearest, owner, first, segments, limit, best, width)
        if weights is None:
            tile = 32
            tiles = blocks(segments, total, tile)
            _isolation[(len(tiles[0]),)](
                *rows, factor, *tiles, segments, best, width, pools, WIDTH=sizes["WIDTH"],
                BLOCK=min(64, sizes["BLOCK"]), TILE=tile,
            )  # fmt: skip
        else:
            _pick[(len(owner),)](*pick, 0, pools, WEIGHTED=True, START=True, ROWS=ROWS, **sizes)
        for step in range(1, width):
            _pick[(len(owner),)](*pick, step, pools, WEIGHTED=weights is not None, START=False, ROWS=ROWS, **sizes)
    return decode(best, segments, limit)
