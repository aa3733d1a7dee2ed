# SPDX-License-Identifier: Apache-2.0
"""Products of a few promising rows with all others, made ahead of the picks of a long pool on a GPU.

A sequential rule over a pool that is too long for a matrix of all pairs would read all features at every pick. Values
only fall, though, so the next picks are mostly among the rows that are worth most now: their products with all rows are
made together, on the matrix cores, in one pass over the features. A pick outside this window reads the features itself
and asks for a new one. The device alone decides about that: launches that are not needed end at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton import WIDEN, ordered

WINDOW_BYTES = 32_000_000
EVERY = 8  # picks between two looks at whether a new window is needed
_SCAN, _LINES, _TILE = 4096, 64, 128


@triton.jit(do_not_specialize=["step", "side"])
def _select(
    values, segments, limit, missed, fresh, taken, rows, slots, step, side, SCAN: tl.constexpr
):  # fmt: skip
    """Puts about the `side` largest values of a pool into its window, if a pick was outside the last one."""
    pool = tl.program_id(0)
    wanted = (tl.load(missed + pool) != 0) & (step < tl.load(limit + pool))
    tl.store(fresh + pool, wanted.to(tl.int32))
    if not wanted:
        return
    start, stop = tl.load(segments + pool), tl.load(segments + pool + 1)
    least, most = tl.full([], -0x7FFFFFFF, tl.int64), tl.full([], 0x7F800000, tl.int64)
    found = tl.full([], 0x7FFFFFFF, tl.int32)
    while (least < most) & (found != side):
        middle = least + (most - least + 1) // 2
        count = tl.full([], 0, tl.int32)
        for first in range(start, stop, SCAN):
            place = first + tl.arange(0, SCAN)
            value = tl.load(values + place, mask=place < stop, other=-float("inf"))
            count += tl.sum((ordered(value) >= middle).to(tl.int32), 0)
        enough = count >= side
        least = tl.where(enough, middle, least)
        found = tl.where(enough, count, found)
        most = tl.where(enough, most, middle - 1)
    number = tl.full([], 0, tl.int32)
    for first in range(start, stop, SCAN):
        place = first + tl.arange(0, SCAN)
        value = tl.load(values + place, mask=place < stop, other=-float("inf"))
        inside = (ordered(value) >= least) & (value > -float("inf"))
        slot = number + tl.cumsum(inside.to(tl.int32), 0) - 1
        inside = inside & (slot < side)
        tl.store(rows + pool * side + slot, place, mask=inside)
        tl.store(slots + place, tl.where(inside, slot, -1), mask=place < stop)
        number += tl.sum(inside.to(tl.int32), 0)
    for first in range(number, side, SCAN):
        slot = first + tl.arange(0, SCAN)
        tl.store(rows + pool * side + slot, tl.zeros([SCAN], tl.int64) - 1, mask=slot < side)
    tl.debug_barrier()  # every thread has read `missed` by now
    tl.store(missed + pool, 0)
    tl.store(taken + pool, step - 1)


@triton.jit(do_not_specialize=["side", "total"])
def _products(
    features, row_stride, column_stride, factor, cholesky, segments, fresh, taken, rows, lines, side, longest, total,
    EXPLAINED: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, LINES: tl.constexpr, TILE: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    """One tile of the scaled products of a window's rows with all rows of the pool.

    With `EXPLAINED`, what the first `taken` rows of a Cholesky factor `[K, M]` explain is taken out.
    """
    pool = tl.program_id(2)
    if tl.load(fresh + pool) == 0:
        return
    start, stop = tl.load(segments + pool), tl.load(segments + pool + 1)
    place, slot = tl.program_id(0) * TILE + tl.arange(0, TILE), tl.program_id(1) * LINES + tl.arange(0, LINES)
    if start + tl.program_id(0) * TILE >= stop:
        return
    mine = tl.load(rows + pool * side + slot, mask=slot < side, other=-1)
    inside, known, theirs = mine >= 0, start + place < stop, start + place
    at, there = mine.to(tl.int64) * row_stride, theirs.to(tl.int64) * row_stride
    result = tl.zeros([LINES, TILE], tl.float32)
    for part in range(0, WIDTH, BLOCK):
        column = part + tl.arange(0, BLOCK)
        valid = column < WIDTH
        mask = inside[:, None] & valid[None, :]
        a = tl.load(features + at[:, None] + column[None, :] * column_stride, mask=mask, other=0.0)
        mask = known[None, :] & valid[:, None]
        b = tl.load(features + there[None, :] + column[:, None] * column_stride, mask=mask, other=0.0)
        if WIDEN:
            a, b = a.to(tl.float32), b.to(tl.float32)
        result = tl.dot(a, b, result, input_precision="ieee")
    scale = tl.load(factor + mine, mask=inside, other=0.0)[:, None]
    scale = scale * tl.load(factor + theirs, mask=known, other=0.0)[None, :]
    result = tl.where(scale == 0, 0.0, result * scale)
    if EXPLAINED:
        count = tl.load(taken + pool)
        for first in range(0, count, STEPS):
            step = first + tl.arange(0, STEPS)
            line, earlier = step.to(tl.int64) * total, step < count
            mask = inside[:, None] & earlier[None, :]
            a = tl.load(cholesky + line[None, :] + mine[:, None], mask=mask, other=0.0)
            mask = known[None, :] & earlier[:, None]
            b = tl.load(cholesky + line[:, None] + theirs[None, :], mask=mask, other=0.0)
            result -= tl.dot(a, b, input_precision="ieee")
    lines += pool.to(tl.int64) * side * longest
    at = slot.to(tl.int64)[:, None] * longest + place[None, :]
    tl.store(lines + at, result, mask=inside[:, None] & known[None, :])


class Window:
    """Promising rows of every pool, and their products with all rows.

    Args:
        features: `[M, D]`.
        factor: `[M]` float32 on the rows.
        segments, limit: `[S + 1]` offsets, `[S]` rows to choose.
        longest: Rows of the longest pool, or more.

    Attributes:
        slots: `[M]` int32 place of each row in its pool's window, -1 outside.
        missed: `[S]` int32, not zero where a pick was outside the window: who picks writes it.
        taken: `[S]` int32 rows of the Cholesky factor that are taken out of the products.
        lines: `[S, side, longest]` float32 products.
        side: Rows of a window; with 0 there is none, and every pick is outside.
    """

    def __init__(self, features: Tensor, factor: Tensor, segments: Tensor, limit: Tensor, longest: int) -> None:
        self.features, self.factor, self.segments, self.limit = features, factor, segments, limit
        self.longest, pools, device = longest, len(limit), features.device
        self.side = min(longest, WINDOW_BYTES // (4 * longest * pools))
        self.slots = torch.full((len(features),), -1, dtype=torch.int32, device=device)
        self.missed, self.fresh, self.taken = torch.ones(3, pools, dtype=torch.int32, device=device).unbind()
        self.rows = torch.full((pools, self.side), -1, dtype=torch.int64, device=device)
        self.lines = torch.empty(pools, self.side, longest, device=device)

    def renew(self, values: Tensor, step: int, cholesky: Tensor | None = None) -> None:
        """Looks before pick `step` is made whether new windows are needed, and makes them.

        Args:
            values: `[M]` float32 what each row is worth; minus infinity for chosen rows.
            step: Number of the pick.
            cholesky: `[K, M]` float32 rows of a Cholesky factor, of which the first `step - 1` are taken out.
        """
        if step % EVERY or self.side == 0:
            return
        pools = len(self.limit)
        _select[(pools,)](
            values, self.segments, self.limit, self.missed, self.fresh, self.taken, self.rows, self.slots, step,
            self.side, SCAN=_SCAN, num_warps=16,
        )  # fmt: skip
        half = self.features.element_size() == 2
        _products[(triton.cdiv(self.longest, _TILE), triton.cdiv(self.side, _LINES), pools)](
            self.features, *self.features.stride(), self.factor, self.factor if cholesky is None else cholesky,
            self.segments, self.fresh, self.taken, self.rows, self.lines, self.side, self.longest, len(self.features),
            EXPLAINED=cholesky is not None, WIDTH=self.features.shape[1], BLOCK=64 if half else 32, LINES=_LINES,
            TILE=_TILE, STEPS=16, num_warps=8,
        )  # fmt: skip
