# SPDX-License-Identifier: Apache-2.0
"""Greedy MAP of a conditional DPP on a GPU.

If the kernel matrix of a group fits into the memory limit, it is computed first. Then one program per group makes
`_STEPS` picks from it, each reading few rows of the Cholesky factor, and a launch over the matrix subtracts their
products before the next picks. Longer groups take one launch per pick, which adds one row to the factor: gains are
read from one buffer and written to another, so that no block reads another's new value; the next pick is a maximum of
integers, which does not depend on the execution order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._ragged import factors, finite, plan, self_cosine
from .._triton import NOTHING, blocks, key_row, power_of_two, rank_key
from .._triton_pairs import groups_at_once, pairs, side_of
from .._triton_rows import ROWS, column_block, lengths, picks, products, rows_of
from .._triton_window import Window
from .naive import EXHAUSTED

_STEPS, _TILE = 32, 64  # picks between two updates of the matrix, and tile size of an update


@triton.jit
def _gain_key(gain, variance, row, tolerance):
    """Key of `rank_key` for a gain; rows without residual variance rank last, by their own variance."""
    exhausted_key = (variance.to(tl.int32, bitcast=True).to(tl.int64) - 0x80000000) << 32
    key = tl.where(gain > tolerance * variance, rank_key(gain, row), exhausted_key | (0x7FFFFFFF - row).to(tl.int64))
    return tl.where(gain > -float("inf"), key, -0x7FFFFFFFFFFFFFFF)


@triton.jit
def _explained(row, chol_ptr, stride_c, pivot, cols, mask, n_steps, UNROLL: tl.constexpr):
    """Subtracts the contribution of the first `n_steps` rows of the factor (row stride `stride_c`) from `row`."""
    for start in range(0, n_steps, UNROLL):
        for i in tl.static_range(UNROLL):  # loads several rows at a time
            ptr = chol_ptr + (tl.zeros([], tl.int64) + start + i) * stride_c
            k_mask = start + i < n_steps
            row -= tl.load(ptr + pivot, mask=k_mask, other=0.0) * tl.load(ptr + cols, mask=mask & k_mask, other=0.0)
    return row


@triton.jit(do_not_specialize=["max_budget", "first_group", "first_step"])
def _choose(
    matrix_ptr, variance_ptr, gain_ptr, chol_ptr, offsets_ptr, budget_ptr, order_ptr, max_budget, first_group,
    first_step, side, tolerance, max_rank,
    STEPS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Makes picks `first_step` to `first_step + STEPS` of one group from its residual kernel matrix."""
    group = first_group + tl.program_id(0)
    start, stop = tl.load(offsets_ptr + group), tl.load(offsets_ptr + group + 1)
    cols = tl.arange(0, BLOCK_N)
    mask, line_mask = cols < stop - start, cols < side
    matrix_ptr += tl.program_id(0).to(tl.int64) * side * side
    chol_ptr += tl.program_id(0) * STEPS * side
    variance = tl.load(variance_ptr + start + cols, mask=mask, other=0.0)
    gain = tl.load(gain_ptr + start + cols, mask=mask, other=-float("inf"))
    for step in range(first_step, tl.minimum(first_step + STEPS, tl.load(budget_ptr + group))):
        # After `max_rank` picks all residuals are zero up to rounding, and rows rank by variance.
        best_key = tl.max(_gain_key(gain, variance, cols, tl.where(step < max_rank, tolerance, float("inf"))), 0)
        pivot = key_row(best_key)
        tl.store(order_ptr + group * max_budget + step, start + pivot)
        row = tl.load(matrix_ptr + pivot * side + cols, mask=line_mask, other=0.0)
        row = _explained(row, chol_ptr, side, pivot, cols, line_mask, step - first_step, 4)
        # A negative key belongs to a row without residual variance, whose row of the factor is zero.
        pivot_gain = (best_key >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        row = tl.where(best_key < 0, 0.0, row / tl.sqrt(pivot_gain))
        tl.store(chol_ptr + (step - first_step) * side + cols, row, mask=line_mask)
        gain = tl.where(cols == pivot, -float("inf"), gain - row * row)
        tl.debug_barrier()  # the next picks read values written by other threads
    tl.store(gain_ptr + start + cols, gain, mask=mask)


@triton.jit(do_not_specialize=["first_group", "first_step"])
def _take_out(
    matrix_ptr, chol_ptr, offsets_ptr, budget_ptr, first_group, first_step, side,
    STEPS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Subtracts the products of `STEPS` rows of the factor from a tile of the matrix."""
    group = first_group + tl.program_id(2)
    if first_step + STEPS >= tl.load(budget_ptr + group):
        return
    length = tl.load(offsets_ptr + group + 1) - tl.load(offsets_ptr + group)
    rows, cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask, col_mask, steps = rows < length, cols < length, tl.arange(0, STEPS)
    chol_ptr += tl.program_id(2) * STEPS * side
    a = tl.load(chol_ptr + steps[None, :] * side + rows[:, None], mask=row_mask[:, None], other=0.0)
    b = tl.load(chol_ptr + steps[:, None] * side + cols[None, :], mask=col_mask[None, :], other=0.0)
    matrix_ptr += tl.program_id(2).to(tl.int64) * side * side
    ptrs, mask = matrix_ptr + rows[:, None] * side + cols[None, :], row_mask[:, None] & col_mask[None, :]
    tl.store(ptrs, tl.load(ptrs, mask=mask, other=0.0) - tl.dot(a, b, input_precision="ieee"), mask=mask)


@triton.jit(do_not_specialize=["side", "max_budget", "step"])
def _pick(
    x_ptr, stride_xm, stride_xd, factor_ptr, variance_ptr, gain_ptr, new_gain_ptr, chol_ptr, n_rows, block_group_ptr,
    block_start_ptr, offsets_ptr, budget_ptr, best_ptr, slots_ptr, missed_ptr, taken_ptr, products_ptr, side,
    max_length, max_budget, step, n_groups, tolerance,
    IS_FIRST: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Computes row `step - 1` of the factor, and the key of pick `step`."""
    group = tl.load(block_group_ptr + tl.program_id(0))
    if group >= n_groups:
        return
    if step >= tl.load(budget_ptr + group):
        return
    start, stop = tl.load(offsets_ptr + group), tl.load(offsets_ptr + group + 1)
    rows = tl.load(block_start_ptr + tl.program_id(0)) + tl.arange(0, BLOCK_M)
    row_mask = rows < stop
    variance = tl.load(variance_ptr + rows, mask=row_mask, other=0.0)
    gain = tl.load(gain_ptr + rows, mask=row_mask, other=-float("inf"))
    if not IS_FIRST:
        key = tl.load(best_ptr + group * max_budget + step - 1)
        pivot = start + key_row(key)
        slot = tl.load(slots_ptr + pivot)
        first_step = tl.zeros([], tl.int32)
        if slot >= 0:
            line_ptr = products_ptr + (group.to(tl.int64) * side + slot) * max_length
            row = tl.load(line_ptr + rows - start, mask=row_mask, other=0.0)
            first_step += tl.load(taken_ptr + group)
        else:
            tl.store(missed_ptr + group, 1)
            scale = tl.load(factor_ptr + rows, mask=row_mask, other=0.0) * tl.load(factor_ptr + pivot)
            row = products(x_ptr, stride_xm, stride_xd, rows, row_mask, pivot, D, BLOCK_D)
            row = tl.where(scale == 0, 0.0, row * scale)
        chol_start_ptr = chol_ptr + first_step.to(tl.int64) * n_rows
        row = _explained(row, chol_start_ptr, n_rows, pivot, rows, row_mask, step - 1 - first_step, 8)
        row = tl.where(key < 0, 0.0, row / tl.sqrt(tl.load(gain_ptr + pivot)))
        tl.store(chol_ptr + (tl.zeros([], tl.int64) + step - 1) * n_rows + rows, row, mask=row_mask)
        gain = tl.where(rows == pivot, -float("inf"), gain - row * row)
        tl.store(new_gain_ptr + rows, gain, mask=row_mask)
    tl.atomic_max(best_ptr + group * max_budget + step, tl.max(_gain_key(gain, variance, rows - start, tolerance), 0))


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
    together = groups_at_once(max_length, groups, _STEPS)
    side, tiles = side_of(max_length), triton.cdiv(max_length, _TILE)
    order = torch.full((groups, max_budget), -1, dtype=torch.int64, device=device)
    matrix = torch.empty(together, side, side, device=device, dtype=torch.float32)
    cholesky, left = torch.empty(together, _STEPS, side, device=device, dtype=torch.float32), variance.clone()
    for first in range(0, groups, together):
        count = min(together, groups - first)
        pairs(features, factor, offsets, max_length, first, count, matrix, None)
        for begin in range(0, max_budget, _STEPS):
            _choose[(count,)](
                matrix, variance, left, cholesky, offsets, limit, order, max_budget, first, begin, side, EXHAUSTED,
                features.shape[1], STEPS=_STEPS, BLOCK_N=power_of_two(side), num_warps=8,
            )  # fmt: skip
            if begin + _STEPS < max_budget:
                _take_out[(tiles, tiles, count)](
                    matrix, cholesky, offsets, limit, first, begin, side, STEPS=_STEPS, BLOCK_N=_TILE
                )
    return order


def _stream(window: Window, variance: Tensor, max_budget: int) -> Tensor:
    """Selects from groups that are too long for a matrix of all pairs."""
    features, offsets, limit = window.features, window.offsets, window.limit
    total, groups, device = len(features), len(limit), features.device
    best = torch.full((groups, max_budget), NOTHING, dtype=torch.int64, device=device)
    left, left_new = variance.clone(), variance.clone()
    cholesky = torch.zeros(max_budget, total, device=device, dtype=torch.float32)
    owner, first = blocks(offsets, total, ROWS)
    for step in range(max_budget):
        if step:
            window.renew(left, step, cholesky)
        _pick[(len(owner),)](
            features, *features.stride(), window.factor, variance, left, left_new, cholesky, total, owner, first,
            offsets, limit, best, window.slots, window.missed, window.taken, window.lines, window.side,
            window.max_length, max_budget, step, groups,
            EXHAUSTED if step < features.shape[1] else float("inf"), IS_FIRST=step == 0, D=features.shape[1],
            BLOCK_D=column_block(features.shape[1]), BLOCK_M=ROWS,
        )  # fmt: skip
        if step:
            left, left_new = left_new, left
    return picks(rows_of(best), offsets, limit)
