# SPDX-License-Identifier: Apache-2.0
"""Greedy MAP of a conditional DPP on a GPU.

If the kernel matrix of a group fits into the allowed memory, it is computed first. Then one program per group makes
`_STEPS` picks from it, reading few rows of the Cholesky factor for each, and a launch over the whole matrix subtracts
the products of these rows before the next picks. Longer groups take one launch per pick, which adds one row to the
factor: gains are read from one buffer and written to another, so that no block reads another's new value; the next pick
is a maximum of integers, which is the same in every order of execution.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._ragged import finite, plan, self_cosine
from .._triton import NOTHING, blocks, key_row, power_of_two, rank_key
from .._triton_pairs import groups_at_once, pairs, side_of
from .._triton_rows import ROWS, column_block, decode, factors, lengths, products
from .._triton_window import Window
from .naive import EXHAUSTED

_STEPS, _TILE = 32, 64  # picks between two updates of the matrix, and the size of the updated tiles


@triton.jit
def _gain_key(gain, own, place, exhausted):
    """Key of `rank_key` for a gain; explained rows come after all others, by their own variance."""
    low = (own.to(tl.int32, bitcast=True).to(tl.int64) - 0x80000000) << 32
    key = tl.where(gain > exhausted * own, rank_key(gain, place), low | (0x7FFFFFFF - place).to(tl.int64))
    return tl.where(gain > -float("inf"), key, -0x7FFFFFFFFFFFFFFF)


@triton.jit
def _explained(row, cholesky, line, one, place, inside, count, UNROLL: tl.constexpr):
    """Subtracts from `row` what the first `count` rows of the factor, with row stride `line`, explain of it."""
    for begin in range(0, count, UNROLL):
        for ahead in tl.static_range(UNROLL):  # so that several rows are loaded at a time
            there = cholesky + (tl.zeros([], tl.int64) + begin + ahead) * line
            known = begin + ahead < count
            row -= tl.load(there + one, mask=known, other=0.0) * tl.load(there + place, mask=inside & known, other=0.0)
    return row


@triton.jit(do_not_specialize=["max_budget", "first", "begin"])
def _choose(
    matrix, variance, left, cholesky, offsets, limit, order, max_budget, first, begin, side, exhausted, rank,
    STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Makes picks `begin` to `begin + STEPS` of one group, from the matrix that earlier picks leave unexplained."""
    group = first + tl.program_id(0)
    start, stop = tl.load(offsets + group), tl.load(offsets + group + 1)
    place = tl.arange(0, BLOCK)
    inside, line = place < stop - start, place < side
    matrix += tl.program_id(0).to(tl.int64) * side * side
    cholesky += tl.program_id(0) * STEPS * side
    own = tl.load(variance + start + place, mask=inside, other=0.0)
    gain = tl.load(left + start + place, mask=inside, other=-float("inf"))
    for step in range(begin, tl.minimum(begin + STEPS, tl.load(limit + group))):
        # As many rows as there are dimensions explain all others; what seems left of them is rounding.
        best = tl.max(_gain_key(gain, own, place, tl.where(step < rank, exhausted, float("inf"))), 0)
        one = key_row(best)
        tl.store(order + group * max_budget + step, start + one)
        row = tl.load(matrix + one * side + place, mask=line, other=0.0)
        row = _explained(row, cholesky, side, one, place, line, step - begin, 4)
        # A negative key belongs to a row that the selected ones explain, whose row of the factor is zero.
        value = (best >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        row = tl.where(best < 0, 0.0, row / tl.sqrt(value))
        tl.store(cholesky + (step - begin) * side + place, row, mask=line)
        gain = tl.where(place == one, -float("inf"), gain - row * row)
        tl.debug_barrier()  # the next picks read values that other threads have written
    tl.store(left + start + place, gain, mask=inside)


@triton.jit(do_not_specialize=["first", "begin"])
def _take_out(
    matrix, cholesky, offsets, limit, first, begin, side, STEPS: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Subtracts the products of `STEPS` rows of the factor from a tile of the matrix."""
    group = first + tl.program_id(2)
    if begin + STEPS >= tl.load(limit + group):
        return
    length = tl.load(offsets + group + 1) - tl.load(offsets + group)
    mine, theirs = tl.program_id(0) * TILE + tl.arange(0, TILE), tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside, known, step = mine < length, theirs < length, tl.arange(0, STEPS)
    cholesky += tl.program_id(2) * STEPS * side
    a = tl.load(cholesky + step[None, :] * side + mine[:, None], mask=inside[:, None], other=0.0)
    b = tl.load(cholesky + step[:, None] * side + theirs[None, :], mask=known[None, :], other=0.0)
    matrix += tl.program_id(2).to(tl.int64) * side * side
    at, both = matrix + mine[:, None] * side + theirs[None, :], inside[:, None] & known[None, :]
    tl.store(at, tl.load(at, mask=both, other=0.0) - tl.dot(a, b, input_precision="ieee"), mask=both)


@triton.jit(do_not_specialize=["side", "max_budget", "step"])
def _pick(
    features, row_stride, column_stride, factor, variance, left, left_new, cholesky, total, owner, first, offsets,
    limit, best, slots, missed, taken, lines, side, max_length, max_budget, step, groups, exhausted,
    START: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Computes row `step - 1` of the factor, and the key of pick `step`."""
    group = tl.load(owner + tl.program_id(0))
    if group >= groups:
        return
    if step >= tl.load(limit + group):
        return
    start, stop = tl.load(offsets + group), tl.load(offsets + group + 1)
    rows = tl.load(first + tl.program_id(0)) + tl.arange(0, ROWS)
    inside = rows < stop
    own = tl.load(variance + rows, mask=inside, other=0.0)
    gain = tl.load(left + rows, mask=inside, other=-float("inf"))
    if not START:
        key = tl.load(best + group * max_budget + step - 1)
        one = start + key_row(key)
        slot = tl.load(slots + one)
        begin = tl.zeros([], tl.int32)
        if slot >= 0:
            line = lines + (group.to(tl.int64) * side + slot) * max_length
            row = tl.load(line + rows - start, mask=inside, other=0.0)
            begin += tl.load(taken + group)
        else:
            tl.store(missed + group, 1)
            scale = tl.load(factor + rows, mask=inside, other=0.0) * tl.load(factor + one)
            row = products(features, row_stride, column_stride, rows, inside, one, WIDTH, BLOCK)
            row = tl.where(scale == 0, 0.0, row * scale)
        known = cholesky + begin.to(tl.int64) * total
        row = _explained(row, known, total, one, rows, inside, step - 1 - begin, 8)
        row = tl.where(key < 0, 0.0, row / tl.sqrt(tl.load(left + one)))
        tl.store(cholesky + (tl.zeros([], tl.int64) + step - 1) * total + rows, row, mask=inside)
        gain = tl.where(rows == one, -float("inf"), gain - row * row)
        tl.store(left_new + rows, gain, mask=inside)
    tl.atomic_max(best + group * max_budget + step, tl.max(_gain_key(gain, own, rows - start, exhausted), 0))


def dpp_map(
    features: Tensor,
    relevance: Tensor,
    offsets: Tensor,
    budgets: Tensor,
    max_budget: int | None = None,
    max_length: int | None = None,
) -> Tensor:
    """See `vtprune_kernels.dpp_map`."""
    device, groups = features.device, len(budgets)
    offsets, limit, max_budget, max_length = plan(offsets, budgets, len(features), device, max_budget, max_length)
    if max_budget == 0 or max_length == 0:
        return torch.full((groups, max_budget), -1, dtype=torch.int64, device=device)
    length = lengths(features)
    relevance = torch.nan_to_num(relevance.float(), nan=0.0, posinf=0.0, neginf=0.0)
    factor, variance = factors(length) * relevance, finite(self_cosine(length) * relevance.square())
    if groups_at_once(max_length, groups, _STEPS):
        return _whole(features, factor, variance, offsets, limit, max_budget, max_length)
    return _stream(Window(features, factor, offsets, limit, max_length), variance, max_budget)


def _whole(
    features: Tensor, factor: Tensor, variance: Tensor, offsets: Tensor, limit: Tensor, max_budget: int, max_length: int
) -> Tensor:
    """Selects from matrices of all pairs."""
    groups, device = len(limit), features.device
    together, side, tiles = (
        groups_at_once(max_length, groups, _STEPS),
        side_of(max_length),
        triton.cdiv(max_length, _TILE),
    )
    order = torch.full((groups, max_budget), -1, dtype=torch.int64, device=device)
    matrix = torch.empty(together, side, side, device=device)
    cholesky, left = torch.empty(together, _STEPS, side, device=device), variance.clone()
    for first in range(0, groups, together):
        count = min(together, groups - first)
        pairs(features, factor, offsets, max_length, first, count, matrix, None)
        for begin in range(0, max_budget, _STEPS):
            _choose[(count,)](
                matrix, variance, left, cholesky, offsets, limit, order, max_budget, first, begin, side, EXHAUSTED,
                features.shape[1], STEPS=_STEPS, BLOCK=power_of_two(side), num_warps=8,
            )  # fmt: skip
            if begin + _STEPS < max_budget:
                _take_out[(tiles, tiles, count)](
                    matrix, cholesky, offsets, limit, first, begin, side, STEPS=_STEPS, TILE=_TILE
                )
    return order


def _stream(window: Window, variance: Tensor, max_budget: int) -> Tensor:
    """Selects from groups that are too long for a matrix of all pairs."""
    features, offsets, limit = window.features, window.offsets, window.limit
    total, groups, device = len(features), len(limit), features.device
    best = torch.full((groups, max_budget), NOTHING, dtype=torch.int64, device=device)
    left, left_new = variance.clone(), variance.clone()
    cholesky = torch.zeros(max_budget, total, device=device)
    owner, first = blocks(offsets, total, ROWS)
    for step in range(max_budget):
        if step:
            window.renew(left, step, cholesky)
        _pick[(len(owner),)](
            features, *features.stride(), window.factor, variance, left, left_new, cholesky, total, owner, first,
            offsets, limit, best, window.slots, window.missed, window.taken, window.lines, window.side,
            window.max_length, max_budget, step, groups,
            EXHAUSTED if step < features.shape[1] else float("inf"), START=step == 0, WIDTH=features.shape[1],
            BLOCK=column_block(features.shape[1]), ROWS=ROWS,
        )  # fmt: skip
        if step:
            left, left_new = left_new, left
    return decode(best, offsets, limit)
