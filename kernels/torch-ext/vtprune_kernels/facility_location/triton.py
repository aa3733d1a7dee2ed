# SPDX-License-Identifier: Apache-2.0
"""Greedy facility location on a GPU.

If the cosines of all pairs of a group fit into the allowed memory, they are computed first, and every pick is one
launch over the whole matrix: blocks of rows add the last pick to the coverage and recompute their gains. For longer
groups the gains are updated instead: a pick raises the coverage of some columns only, and three launches compute the
products of the pick, list these columns, and subtract the loss in these columns from each gain. Cosines are integer
numbers of steps, so that sums are exact and no pick depends on the order in which blocks finish. The number of columns
is never read by the host.
"""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._ragged import on, plan, self_cosine
from .._triton import NOTHING, WIDEN, blocks, key_row, power_of_two, rank_key
from .._triton_pairs import groups_at_once, pairs, side_of
from .._triton_rows import ROWS, column_block, decode, factors, lengths, products
from .naive import GRID, usable

_TILE, _SCAN = 64, 4096


@triton.jit
def _gain(cosine, cover, known):
    """Float64 sums over the `known` columns of what the cosines `[R, C]` exceed the coverage `[C]` by, in steps."""
    more = tl.where(known[None, :], cosine - cover[None, :], 0.0)
    return tl.sum(tl.where(more > 1, more, 0.0), 1).to(tl.float64)


@triton.jit
def _steps(cosine, grid):
    return tl.floor(cosine * grid + 0.5)


@triton.jit
def _offer(gain, grid, weights, rows, inside, place, chosen, best, last, WEIGHTED: tl.constexpr, ADD: tl.constexpr):
    """Raises the best key to that of the free rows; row `last` was selected just before."""
    value = gain / grid
    if WEIGHTED:
        weight = tl.load(weights + rows, mask=inside, other=0.0).to(tl.float64)
        value = value + weight if ADD else value * weight
    value = value.to(tl.float32)
    mine = inside & (rows == last)
    tl.store(chosen + rows, tl.full(rows.shape, 1, tl.int8), mask=mine)
    free = inside & (tl.load(chosen + rows, mask=inside, other=1) == 0) & (rows != last)
    tl.atomic_max(best, tl.max(tl.where(free, rank_key(value, place), -0x7FFFFFFFFFFFFFFF), 0))


@triton.jit(do_not_specialize=["first", "max_budget", "step"])
def _pick(
    matrix, own, weights, covered, covered_new, chosen, offsets, limit, best, side, max_budget, first, step, grid,
    WEIGHTED: tl.constexpr, ADD: tl.constexpr, START: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Adds pick `step - 1` to the coverage, and offers the gains of a block of rows for pick `step`."""
    group = first + tl.program_id(1)
    if step >= tl.load(limit + group):
        return
    start, stop = tl.load(offsets + group), tl.load(offsets + group + 1)
    length = stop - start
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    if tl.program_id(0) * ROWS >= length:
        return
    inside = place < length
    matrix += tl.program_id(1).to(tl.int64) * side * side
    one = tl.full([], -1, tl.int32)
    if not START:
        one = key_row(tl.load(best + group * max_budget + step - 1))
    self = tl.load(own + start + place, mask=inside, other=0.0) * grid
    gain = tl.zeros([ROWS], tl.float64)
    for begin in range(0, length, TILE):
        column = begin + tl.arange(0, TILE)
        known = column < length
        cover = tl.load(covered + start + column, mask=known, other=0.0)
        if not START:
            line = _steps(tl.load(matrix + one * side + column, mask=known, other=0.0), grid)
            line = tl.where(column == one, tl.load(own + start + one) * grid, line)
            cover = tl.maximum(cover, line)
            tl.store(covered_new + start + column, cover, mask=known & (tl.program_id(0) == 0))
        at = matrix + place[:, None] * side + column[None, :]
        cosine = _steps(tl.load(at, mask=inside[:, None] & known[None, :], other=0.0), grid)
        cosine = tl.where(place[:, None] == column[None, :], self[:, None], cosine)
        gain += _gain(cosine, cover, known)
    key = best + group * max_budget + step
    _offer(gain, grid, weights, start + place, inside, place, chosen, key, start + one, WEIGHTED, ADD)


@triton.jit(do_not_specialize=["max_budget", "step"])
def _cover(
    features, row_stride, column_stride, factor, own, covered, covered_new, owner, first, offsets, limit, best,
    max_budget, step, groups, grid, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Adds pick `step - 1` to the coverage of a block of rows."""
    group = tl.load(owner + tl.program_id(0))
    if group >= groups:
        return
    if step >= tl.load(limit + group):
        return
    start, stop = tl.load(offsets + group), tl.load(offsets + group + 1)
    rows = tl.load(first + tl.program_id(0)) + tl.arange(0, ROWS)
    inside = rows < stop
    one = start + key_row(tl.load(best + group * max_budget + step - 1))
    scale = tl.load(factor + rows, mask=inside, other=0.0) * tl.load(factor + one)
    total = products(features, row_stride, column_stride, rows, inside, one, WIDTH, BLOCK)
    cosine = tl.where(scale == 0, 0.0, total * scale)
    cosine = _steps(tl.where(rows == one, tl.load(own + one), cosine), grid)
    tl.store(covered_new + rows, tl.maximum(tl.load(covered + rows, mask=inside, other=0.0), cosine), mask=inside)


@triton.jit(do_not_specialize=["step"])
def _raised(covered, covered_new, columns, count, offsets, limit, step, SCAN: tl.constexpr):
    """Lists the rows of a group whose coverage has increased."""
    group = tl.program_id(0)
    if step >= tl.load(limit + group):
        return
    start, stop = tl.load(offsets + group), tl.load(offsets + group + 1)
    number = tl.full([], 0, tl.int32)
    for first in range(start, stop, SCAN):
        place = first + tl.arange(0, SCAN)
        inside = place < stop
        more = tl.load(covered_new + place, mask=inside, other=0.0) > tl.load(covered + place, mask=inside, other=0.0)
        tl.store(columns + start + number + tl.cumsum(more.to(tl.int32), 0) - 1, place, mask=more)
        number += tl.sum(more.to(tl.int32), 0)
    tl.store(count + group, number)


@triton.jit(do_not_specialize=["max_budget", "step"])
def _change(
    features, row_stride, column_stride, factor, own, weights, covered, covered_new, columns, count, gains, chosen,
    owner, first, offsets, limit, best, max_budget, step, groups, grid, WEIGHTED: tl.constexpr, ADD: tl.constexpr,
    START: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Updates the gains of a tile of rows for the listed columns, and offers them for pick `step`.

    With `START` the columns are all rows of the group, and the gains are those of the first pick.
    """
    group = tl.load(owner + tl.program_id(0))
    if group >= groups:
        return
    if step >= tl.load(limit + group):
        return
    start, stop = tl.load(offsets + group), tl.load(offsets + group + 1)
    mine = tl.load(first + tl.program_id(0)) + tl.arange(0, TILE)
    inside, at = mine < stop, mine.to(tl.int64) * row_stride
    scale = tl.load(factor + mine, mask=inside, other=0.0)
    self = tl.load(own + mine, mask=inside, other=0.0)
    last = tl.full([], -1, tl.int64)
    total = tl.zeros([TILE], tl.float64)
    length = stop - start
    if not START:
        last = start + key_row(tl.load(best + group * max_budget + step - 1))
        total = tl.load(gains + mine, mask=inside, other=0.0)
        length = tl.load(count + group).to(tl.int64)
    for begin in range(0, length, TILE):
        place = begin + tl.arange(0, TILE)
        known = place < length
        theirs = start + place
        if not START:
            theirs = tl.load(columns + start + place, mask=known, other=0)
        there = theirs.to(tl.int64) * row_stride
        cosine = tl.zeros([TILE, TILE], tl.float32)
        for part in range(0, WIDTH, BLOCK):
            column = part + tl.arange(0, BLOCK)
            valid = column < WIDTH
            where = at[:, None] + column[None, :] * column_stride
            a = tl.load(features + where, mask=inside[:, None] & valid[None, :], other=0.0)
            where = there[None, :] + column[:, None] * column_stride
            b = tl.load(features + where, mask=known[None, :] & valid[:, None], other=0.0)
            if WIDEN:
                a, b = a.to(tl.float32), b.to(tl.float32)
            cosine = tl.dot(a, b, cosine, input_precision="ieee")
        both = scale[:, None] * tl.load(factor + theirs, mask=known, other=0.0)[None, :]
        cosine = tl.where(both == 0, 0.0, cosine * both)
        cosine = _steps(tl.where(mine[:, None] == theirs[None, :], self[:, None], cosine), grid)
        new = tl.zeros([TILE], tl.float32)
        if not START:
            new = tl.load(covered_new + theirs, mask=known, other=0.0)
            total -= _gain(cosine, tl.load(covered + theirs, mask=known, other=0.0), known)
        total += _gain(cosine, new, known)
    tl.store(gains + mine, total, mask=inside)
    key = best + group * max_budget + step
    _offer(total, grid, weights, mine, inside, mine - start, chosen, key, last, WEIGHTED, ADD)


def facility_location(
    features: Tensor,
    weights: Tensor | None,
    offsets: Tensor,
    budgets: Tensor,
    max_budget: int | None = None,
    max_length: int | None = None,
    combine: Literal["product", "sum"] = "product",
) -> Tensor:
    """See `vtprune_kernels.facility_location`."""
    device, groups = features.device, len(budgets)
    offsets, limit, max_budget, max_length = plan(offsets, budgets, len(features), device, max_budget, max_length)
    if max_budget == 0 or max_length == 0:
        return torch.full((groups, max_budget), -1, dtype=torch.int64, device=device)
    length = lengths(features)
    factor, own = factors(length), self_cosine(length)
    weights = None if weights is None else usable(on(weights, device)).contiguous()
    best = torch.full((groups, max_budget), NOTHING, dtype=torch.int64, device=device)
    inputs = (features, factor, own, weights, offsets, limit, best, max_length, combine == "sum")
    if groups_at_once(max_length, groups):
        _whole(*inputs)
    else:
        _stream(*inputs)
    return decode(best, offsets, limit)


def _whole(
    features: Tensor, factor: Tensor, own: Tensor, weights: Tensor | None, offsets: Tensor, limit: Tensor,
    best: Tensor, max_length: int, add: bool,
) -> None:  # fmt: skip
    """Selects from matrices of all pairs."""
    groups, max_budget, side, device = *best.shape, side_of(max_length), features.device
    together = groups_at_once(max_length, groups)
    matrix = torch.empty(together, side, side, device=device)
    covered, covered_new = torch.zeros(2, len(features), device=device).unbind()
    chosen = torch.zeros(len(features), dtype=torch.int8, device=device)
    for first in range(0, groups, together):
        count = min(together, groups - first)
        pairs(features, factor, offsets, max_length, first, count, matrix, None)
        for step in range(max_budget):
            _pick[(triton.cdiv(max_length, ROWS), count)](
                matrix, own, own if weights is None else weights, covered, covered_new, chosen, offsets, limit, best,
                side, max_budget, first, step, GRID, WEIGHTED=weights is not None, ADD=add, START=step == 0, ROWS=ROWS,
                TILE=min(256, power_of_two(max_length)),
            )  # fmt: skip
            if step:
                covered, covered_new = covered_new, covered


def _stream(
    features: Tensor, factor: Tensor, own: Tensor, weights: Tensor | None, offsets: Tensor, limit: Tensor,
    best: Tensor, max_length: int, add: bool,
) -> None:  # fmt: skip
    """Selects from groups that are too long for a matrix of all pairs."""
    (groups, max_budget), total, device = best.shape, len(features), features.device
    covered, covered_new = torch.zeros(2, total, device=device).unbind()
    columns = torch.empty(total, dtype=torch.int64, device=device)
    count = torch.zeros(groups, dtype=torch.int32, device=device)
    gains = torch.empty(total, dtype=torch.float64, device=device)
    chosen = torch.zeros(total, dtype=torch.int8, device=device)
    few, tiles = blocks(offsets, total, ROWS), blocks(offsets, total, _TILE)
    for step in range(max_budget):
        if step:
            _cover[(len(few[0]),)](
                features, *features.stride(), factor, own, covered, covered_new, *few, offsets, limit, best, max_budget,
                step, groups, GRID, WIDTH=features.shape[1], BLOCK=column_block(features.shape[1]), ROWS=ROWS,
            )  # fmt: skip
            _raised[(groups,)](covered, covered_new, columns, count, offsets, limit, step, SCAN=_SCAN, num_warps=16)
        _change[(len(tiles[0]),)](
            features, *features.stride(), factor, own, own if weights is None else weights, covered, covered_new,
            columns, count, gains, chosen, *tiles, offsets, limit, best, max_budget, step, groups, GRID,
            WEIGHTED=weights is not None, ADD=add, START=step == 0, WIDTH=features.shape[1],
            BLOCK=64 if features.element_size() == 2 else 32, TILE=_TILE,
        )  # fmt: skip
        if step:
            covered, covered_new = covered_new, covered
