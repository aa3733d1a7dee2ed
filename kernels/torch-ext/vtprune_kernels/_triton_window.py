# SPDX-License-Identifier: Apache-2.0
"""Products of the most promising rows with all others, computed ahead of the picks of a long group on a GPU.

A sequential rule over a group that is too long for a matrix of all pairs would read all features at every pick. Since
values never rise, the next picks are mostly among the rows with the largest values now: the products of this window
with all rows are computed together, on the matrix cores, in one pass over the features. A pick outside the window reads
the features itself and requests a new window. The host does not read these requests: unneeded launches return at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton import WIDEN, ordered

WINDOW_BYTES = 32_000_000
EVERY = 8  # picks between two checks whether a new window is needed
_SCAN, _LINES, _TILE = 4096, 64, 128


@triton.jit(do_not_specialize=["step", "side"])
def _select(
    values, offsets, limit, missed, fresh, taken, rows, slots, step, side, SCAN: tl.constexpr
):  # fmt: skip
    """Fills a group's window with about the `side` largest values, if a pick was outside the last window."""
    group = tl.program_id(0)
    wanted = (tl.load(missed + group) != 0) & (step < tl.load(limit + group))
    tl.store(fresh + group, wanted.to(tl.int32))
    if not wanted:
        return
    start, stop = tl.load(offsets + group), tl.load(offsets + group + 1)
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
        tl.store(rows + group * side + slot, place, mask=inside)
        tl.store(slots + place, tl.where(inside, slot, -1), mask=place < stop)
        number += tl.sum(inside.to(tl.int32), 0)
    for first in range(number, side, SCAN):
        slot = first + tl.arange(0, SCAN)
        tl.store(rows + group * side + slot, tl.zeros([SCAN], tl.int64) - 1, mask=slot < side)
    tl.debug_barrier()  # every thread has read `missed` by now
    tl.store(missed + group, 0)
    tl.store(taken + group, step - 1)


@triton.jit(do_not_specialize=["side", "total"])
def _products(
    features, row_stride, column_stride, factor, cholesky, offsets, fresh, taken, rows, lines, side, max_length, total,
    EXPLAINED: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, LINES: tl.constexpr, TILE: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    """One tile of the scaled products of a window's rows with all rows of the group.

    With `EXPLAINED`, the contribution of the first `taken` rows of a Cholesky factor `[K, M]` is subtracted.
    """
    group = tl.program_id(2)
    if tl.load(fresh + group) == 0:
        return
    start, stop = tl.load(offsets + group), tl.load(offsets + group + 1)
    place, slot = tl.program_id(0) * TILE + tl.arange(0, TILE), tl.program_id(1) * LINES + tl.arange(0, LINES)
    if start + tl.program_id(0) * TILE >= stop:
        return
    mine = tl.load(rows + group * side + slot, mask=slot < side, other=-1)
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
        count = tl.load(taken + group)
        for first in range(0, count, STEPS):
            step = first + tl.arange(0, STEPS)
            line, earlier = step.to(tl.int64) * total, step < count
            mask = inside[:, None] & earlier[None, :]
            a = tl.load(cholesky + line[None, :] + mine[:, None], mask=mask, other=0.0)
            mask = known[None, :] & earlier[:, None]
            b = tl.load(cholesky + line[:, None] + theirs[None, :], mask=mask, other=0.0)
            result -= tl.dot(a, b, input_precision="ieee")
    lines += group.to(tl.int64) * side * max_length
    at = slot.to(tl.int64)[:, None] * max_length + place[None, :]
    tl.store(lines + at, result, mask=inside[:, None] & known[None, :])


class Window:
    """The most promising rows of every group, and their products with all rows.

    Args:
        features: `[M, D]`.
        factor: `[M]` float32 factors on the rows.
        offsets, limit: `[S + 1]` offsets, and `[S]` number of rows to select.
        max_length: Length of the longest group, or more.

    Attributes:
        slots: `[M]` int32 slot of each row in its group's window, -1 outside.
        missed: `[S]` int32, set by the picking kernel to a non-zero value after a pick outside the window.
        taken: `[S]` int32 number of rows of the Cholesky factor that are subtracted from the products.
        lines: `[S, side, max_length]` float32 products.
        side: Number of rows in a window; with 0 there is none, and every pick is outside.
    """

    def __init__(self, features: Tensor, factor: Tensor, offsets: Tensor, limit: Tensor, max_length: int) -> None:
        self.features, self.factor, self.offsets, self.limit = features, factor, offsets, limit
        self.max_length, groups, device = max_length, len(limit), features.device
        self.side = min(max_length, WINDOW_BYTES // (4 * max_length * groups))
        self.slots = torch.full((len(features),), -1, dtype=torch.int32, device=device)
        self.missed, self.fresh, self.taken = torch.ones(3, groups, dtype=torch.int32, device=device).unbind()
        self.rows = torch.full((groups, self.side), -1, dtype=torch.int64, device=device)
        self.lines = torch.empty(groups, self.side, max_length, device=device)

    def renew(self, values: Tensor, step: int, cholesky: Tensor | None = None) -> None:
        """Makes new windows before pick `step`, for groups that need one.

        Args:
            values: `[M]` float32 value of each row; minus infinity for selected rows.
            step: Number of the pick.
            cholesky: `[K, M]` float32 rows of a Cholesky factor, of which the first `step - 1` are subtracted.
        """
        if step % EVERY or self.side == 0:
            return
        groups = len(self.limit)
        _select[(groups,)](
            values, self.offsets, self.limit, self.missed, self.fresh, self.taken, self.rows, self.slots, step,
            self.side, SCAN=_SCAN, num_warps=16,
        )  # fmt: skip
        half = self.features.element_size() == 2
        _products[(triton.cdiv(self.max_length, _TILE), triton.cdiv(self.side, _LINES), groups)](
            self.features, *self.features.stride(), self.factor, self.factor if cholesky is None else cholesky,
            self.offsets, self.fresh, self.taken, self.rows, self.lines, self.side, self.max_length, len(self.features),
            EXPLAINED=cholesky is not None, WIDTH=self.features.shape[1], BLOCK=64 if half else 32, LINES=_LINES,
            TILE=_TILE, STEPS=16, num_warps=8,
        )  # fmt: skip
