# SPDX-License-Identifier: Apache-2.0
"""Greedy facility location on a GPU.

If the cosine matrix of a group fits into the memory limit, it is computed first, and every pick is one launch over the
matrix: blocks of rows add the last pick to the coverage and recompute their gains. For longer groups the gains are
updated: a pick raises the coverage of some columns only, and three launches compute the products of the pick, list
these columns, and update each gain over them. Cosines are quantized to integer steps, so that sums are exact and picks
do not depend on the execution order of blocks. The host never reads the number of columns.
"""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._ragged import factors, on, plan, self_cosine
from .._triton import NOTHING, blocks, key_row, power_of_two, rank_key
from .._triton_pairs import groups_at_once, pairs, side_of, tile_of_products
from .._triton_rows import ROWS, column_block, lengths, picks, products, rows_of
from .naive import COPY, NOISE, TIE, usable

_TILE, _SCAN = 64, 4096
_GRID = 1 << 22  # steps in a cosine of 1; two of them are about the rounding of cosines in float32
_IS_COPY, _NOISE, _TIE = tl.constexpr(1 - COPY), tl.constexpr(NOISE), tl.constexpr(TIE)


@triton.jit
def _gain(cosine, coverage, col_mask):
    """Gains `[R]` float64: sums over valid columns of the excess of cosines `[R, C]` over coverage `[C]`, in steps."""
    excess = tl.where(col_mask[None, :], cosine - coverage[None, :], 0.0)
    return tl.sum(tl.where(excess > 2, excess, 0.0).to(tl.float64), 1)


@triton.jit
def _steps(cosine, grid):
    return tl.floor(cosine * grid + 0.5)


@triton.jit
def _least_tied(best, length, value_ptr, weights_ptr, WEIGHTED: tl.constexpr, ADD: tl.constexpr):
    """See `naive.least_tied`, for the row `best` of a group of `length` rows."""
    value = tl.load(value_ptr + best)
    scale = 1.0
    if WEIGHTED and not ADD:
        scale = tl.load(weights_ptr + best)
    return value - _NOISE * scale, value - _TIE * (tl.abs(value) + tl.sqrt(length.to(tl.float32)) * scale)


@triton.jit
def _offer(
    gain, grid, weights_ptr, rows, row_mask, local_rows, value_ptr, new_value_ptr, key_ptr, last_row,
    WEIGHTED: tl.constexpr, ADD: tl.constexpr, IS_FIRST: tl.constexpr,
):  # fmt: skip
    """Raises the key at `key_ptr` to the largest key of the free rows; `last_row` is the previous pick.

    The values of all rows are stored, minus infinity for those that were picked.
    """
    value = gain / grid
    if WEIGHTED:
        weight = tl.load(weights_ptr + rows, mask=row_mask, other=0.0).to(tl.float64)
        value = value + weight if ADD else value * weight
    value = value.to(tl.float32)
    free = row_mask
    if not IS_FIRST:
        free = free & (rows != last_row) & (tl.load(value_ptr + rows, mask=row_mask, other=0.0) > float("-inf"))
    tl.store(new_value_ptr + rows, tl.where(free, value, float("-inf")), mask=row_mask)
    tl.atomic_max(key_ptr, tl.max(tl.where(free, rank_key(value, local_rows), -0x7FFFFFFFFFFFFFFF), 0))


@triton.jit(do_not_specialize=["first_group", "max_budget", "step"])
def _pick(
    matrix_ptr, self_ptr, weights_ptr, cov_ptr, new_cov_ptr, value_ptr, new_value_ptr, offsets_ptr, budget_ptr,
    best_ptr, picked_ptr, side, max_budget, first_group, step, grid,
    WEIGHTED: tl.constexpr, ADD: tl.constexpr, IS_FIRST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Adds pick `step - 1` to the coverage, and computes the gains of a block of rows for pick `step`."""
    group = first_group + tl.program_id(1)
    budget = tl.load(budget_ptr + group)
    if step > budget:
        return
    start, stop = tl.load(offsets_ptr + group), tl.load(offsets_ptr + group + 1)
    length = stop - start
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    if tl.program_id(0) * BLOCK_M >= length:
        return
    row_mask = rows < length
    matrix_ptr += tl.program_id(1).to(tl.int64) * side * side
    pivot = tl.full([], -1, tl.int32)
    if not IS_FIRST:
        best = key_row(tl.load(best_ptr + group * max_budget + step - 1))
        any_row, a_copy = _least_tied(start + best, length, value_ptr, weights_ptr, WEIGHTED, ADD)
        pivot = best
        for start_n in range(0, best, BLOCK_N):  # the first row that ties with the best one
            cols = start_n + tl.arange(0, BLOCK_N)
            is_copy = tl.load(matrix_ptr + best * side + cols, mask=cols < best, other=0.0) >= _IS_COPY
            value = tl.load(value_ptr + start + cols, mask=cols < best, other=float("-inf"))
            tied = (cols < best) & ((value >= any_row) | (is_copy & (value >= a_copy)))
            pivot = tl.minimum(pivot, tl.min(tl.where(tied, cols, best), 0))
        tl.store(picked_ptr + group * max_budget + step - 1, pivot, mask=tl.program_id(0) == 0)
    if step >= budget:
        return
    self_cosine = tl.load(self_ptr + start + rows, mask=row_mask, other=0.0) * grid
    gain = tl.zeros([BLOCK_M], tl.float64)
    for start_n in range(0, length, BLOCK_N):
        cols = start_n + tl.arange(0, BLOCK_N)
        col_mask = cols < length
        coverage = tl.load(cov_ptr + start + cols, mask=col_mask, other=0.0)
        if not IS_FIRST:
            pivot_cosine = _steps(tl.load(matrix_ptr + pivot * side + cols, mask=col_mask, other=0.0), grid)
            pivot_cosine = tl.where(cols == pivot, tl.load(self_ptr + start + pivot) * grid, pivot_cosine)
            coverage = tl.maximum(coverage, pivot_cosine)
            tl.store(new_cov_ptr + start + cols, coverage, mask=col_mask & (tl.program_id(0) == 0))
        ptrs = matrix_ptr + rows[:, None] * side + cols[None, :]
        cosine = _steps(tl.load(ptrs, mask=row_mask[:, None] & col_mask[None, :], other=0.0), grid)
        cosine = tl.where(rows[:, None] == cols[None, :], self_cosine[:, None], cosine)
        gain += _gain(cosine, coverage, col_mask)
    key_ptr = best_ptr + group * max_budget + step
    _offer(
        gain, grid, weights_ptr, start + rows, row_mask, rows, value_ptr, new_value_ptr, key_ptr, start + pivot,
        WEIGHTED, ADD, IS_FIRST,
    )  # fmt: skip


@triton.jit(do_not_specialize=["max_budget", "step"])
def _first_tied(
    x_ptr, stride_xm, stride_xd, factor_ptr, value_ptr, weights_ptr, block_group_ptr, block_start_ptr, offsets_ptr,
    budget_ptr, best_ptr, picked_ptr, max_budget, step, n_groups,
    WEIGHTED: tl.constexpr, ADD: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Makes pick `step - 1` the first row that ties with the best one, in a block of rows."""
    group = tl.load(block_group_ptr + tl.program_id(0))
    if group >= n_groups:
        return
    if step > tl.load(budget_ptr + group):
        return
    start, stop = tl.load(offsets_ptr + group), tl.load(offsets_ptr + group + 1)
    rows = tl.load(block_start_ptr + tl.program_id(0)) + tl.arange(0, BLOCK_M)
    best = start + key_row(tl.load(best_ptr + group * max_budget + step - 1))
    any_row, a_copy = _least_tied(best, stop - start, value_ptr, weights_ptr, WEIGHTED, ADD)
    value = tl.load(value_ptr + rows, mask=rows < best, other=float("-inf"))
    maybe = (rows < best) & (value >= tl.minimum(any_row, a_copy))
    if tl.max(maybe.to(tl.int32), 0) > 0:
        scale = tl.load(factor_ptr + rows, mask=maybe, other=0.0) * tl.load(factor_ptr + best)
        dot = products(x_ptr, stride_xm, stride_xd, rows, maybe, best, D, BLOCK_D)
        is_copy = tl.where(scale == 0, 0.0, dot * scale) >= _IS_COPY
        tied = maybe & ((value >= any_row) | (is_copy & (value >= a_copy)))
        row = tl.min(tl.where(tied, rows, best), 0) - start
        tl.atomic_min(picked_ptr + group * max_budget + step - 1, row.to(tl.int32))


@triton.jit
def _picked(best_ptr, picked_ptr, place):
    """Local row of a pick, after `_first_tied`."""
    return tl.minimum(key_row(tl.load(best_ptr + place)), tl.load(picked_ptr + place))


@triton.jit(do_not_specialize=["max_budget", "step"])
def _cover(
    x_ptr, stride_xm, stride_xd, factor_ptr, self_ptr, cov_ptr, new_cov_ptr, block_group_ptr, block_start_ptr,
    offsets_ptr, budget_ptr, best_ptr, picked_ptr, max_budget, step, n_groups, grid,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Adds pick `step - 1` to the coverage of a block of rows."""
    group = tl.load(block_group_ptr + tl.program_id(0))
    if group >= n_groups:
        return
    if step >= tl.load(budget_ptr + group):
        return
    start, stop = tl.load(offsets_ptr + group), tl.load(offsets_ptr + group + 1)
    rows = tl.load(block_start_ptr + tl.program_id(0)) + tl.arange(0, BLOCK_M)
    row_mask = rows < stop
    pivot = start + _picked(best_ptr, picked_ptr, group * max_budget + step - 1)
    scale = tl.load(factor_ptr + rows, mask=row_mask, other=0.0) * tl.load(factor_ptr + pivot)
    dot = products(x_ptr, stride_xm, stride_xd, rows, row_mask, pivot, D, BLOCK_D)
    cosine = tl.where(scale == 0, 0.0, dot * scale)
    cosine = _steps(tl.where(rows == pivot, tl.load(self_ptr + pivot), cosine), grid)
    tl.store(new_cov_ptr + rows, tl.maximum(tl.load(cov_ptr + rows, mask=row_mask, other=0.0), cosine), mask=row_mask)


@triton.jit(do_not_specialize=["step"])
def _raised(cov_ptr, new_cov_ptr, columns_ptr, count_ptr, offsets_ptr, budget_ptr, step, BLOCK_N: tl.constexpr):
    """Lists the rows of a group whose coverage has increased."""
    group = tl.program_id(0)
    if step >= tl.load(budget_ptr + group):
        return
    start, stop = tl.load(offsets_ptr + group), tl.load(offsets_ptr + group + 1)
    n_found = tl.full([], 0, tl.int32)
    for start_n in range(start, stop, BLOCK_N):
        cols = start_n + tl.arange(0, BLOCK_N)
        mask = cols < stop
        raised = tl.load(new_cov_ptr + cols, mask=mask, other=0.0) > tl.load(cov_ptr + cols, mask=mask, other=0.0)
        tl.store(columns_ptr + start + n_found + tl.cumsum(raised.to(tl.int32), 0) - 1, cols, mask=raised)
        n_found += tl.sum(raised.to(tl.int32), 0)
    tl.store(count_ptr + group, n_found)


@triton.jit(do_not_specialize=["max_budget", "step"])
def _change(
    x_ptr, stride_xm, stride_xd, factor_ptr, self_ptr, weights_ptr, cov_ptr, new_cov_ptr, columns_ptr, count_ptr,
    gains_ptr, value_ptr, block_group_ptr, block_start_ptr, offsets_ptr, budget_ptr, best_ptr, picked_ptr, max_budget,
    step, n_groups, grid,
    WEIGHTED: tl.constexpr, ADD: tl.constexpr, IS_FIRST: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Updates the gains of a block of rows over the listed columns, for pick `step`.

    With `IS_FIRST` the columns are all rows of the group, and the gains are those of the first pick.
    """
    group = tl.load(block_group_ptr + tl.program_id(0))
    if group >= n_groups:
        return
    if step >= tl.load(budget_ptr + group):
        return
    start, stop = tl.load(offsets_ptr + group), tl.load(offsets_ptr + group + 1)
    rows = tl.load(block_start_ptr + tl.program_id(0)) + tl.arange(0, BLOCK_N)
    row_mask, row_offs = rows < stop, rows.to(tl.int64) * stride_xm
    scale = tl.load(factor_ptr + rows, mask=row_mask, other=0.0)
    self_cosine = tl.load(self_ptr + rows, mask=row_mask, other=0.0)
    pivot = tl.full([], -1, tl.int64)
    gain = tl.zeros([BLOCK_N], tl.float64)
    length = stop - start
    if not IS_FIRST:
        pivot = start + _picked(best_ptr, picked_ptr, group * max_budget + step - 1)
        gain = tl.load(gains_ptr + rows, mask=row_mask, other=0.0)
        length = tl.load(count_ptr + group).to(tl.int64)
    for start_n in range(0, length, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        col_mask = offs_n < length
        cols = start + offs_n
        if not IS_FIRST:
            cols = tl.load(columns_ptr + start + offs_n, mask=col_mask, other=0)
        col_offs = cols.to(tl.int64) * stride_xm
        cosine = tile_of_products(x_ptr, row_offs, row_mask, col_offs, col_mask, stride_xd, D, BLOCK_D, BLOCK_N)
        pair_scale = scale[:, None] * tl.load(factor_ptr + cols, mask=col_mask, other=0.0)[None, :]
        cosine = tl.where(pair_scale == 0, 0.0, cosine * pair_scale)
        cosine = _steps(tl.where(rows[:, None] == cols[None, :], self_cosine[:, None], cosine), grid)
        new_coverage = tl.zeros([BLOCK_N], tl.float32)
        if not IS_FIRST:
            new_coverage = tl.load(new_cov_ptr + cols, mask=col_mask, other=0.0)
            gain -= _gain(cosine, tl.load(cov_ptr + cols, mask=col_mask, other=0.0), col_mask)
        gain += _gain(cosine, new_coverage, col_mask)
    tl.store(gains_ptr + rows, gain, mask=row_mask)
    key_ptr = best_ptr + group * max_budget + step
    _offer(
        gain, grid, weights_ptr, rows, row_mask, rows - start, value_ptr, value_ptr, key_ptr, pivot,
        WEIGHTED, ADD, IS_FIRST,
    )  # fmt: skip


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
    picked = torch.full((groups, max_budget), 0x7FFFFFFF, dtype=torch.int32, device=device)
    inputs = (features, factor, own, weights, offsets, limit, best, picked, max_length, combine == "sum")
    if groups_at_once(max_length, groups):
        _whole(*inputs)
    else:
        _stream(*inputs)
    return picks(torch.minimum(picked, rows_of(best)), offsets, limit)


def _whole(
    features: Tensor, factor: Tensor, own: Tensor, weights: Tensor | None, offsets: Tensor, limit: Tensor,
    best: Tensor, picked: Tensor, max_length: int, add: bool,
) -> None:  # fmt: skip
    """Selects from matrices of all pairs."""
    groups, max_budget, side, device = *best.shape, side_of(max_length), features.device
    together = groups_at_once(max_length, groups)
    matrix = torch.empty(together, side, side, device=device, dtype=torch.float32)
    covered, covered_new = torch.zeros(2, len(features), device=device, dtype=torch.float32).unbind()
    value, value_new = torch.zeros(2, len(features), device=device, dtype=torch.float32).unbind()
    for first in range(0, groups, together):
        count = min(together, groups - first)
        pairs(features, factor, offsets, max_length, first, count, matrix, None)
        for step in range(max_budget + 1):
            _pick[(triton.cdiv(max_length, ROWS), count)](
                matrix, own, own if weights is None else weights, covered, covered_new, value, value_new, offsets,
                limit, best, picked, side, max_budget, first, step, _GRID, WEIGHTED=weights is not None, ADD=add,
                IS_FIRST=step == 0, BLOCK_M=ROWS, BLOCK_N=min(256, power_of_two(max_length)),
            )  # fmt: skip
            value, value_new = value_new, value
            if step:
                covered, covered_new = covered_new, covered


def _stream(
    features: Tensor, factor: Tensor, own: Tensor, weights: Tensor | None, offsets: Tensor, limit: Tensor,
    best: Tensor, picked: Tensor, max_length: int, add: bool,
) -> None:  # fmt: skip
    """Selects from groups that are too long for a matrix of all pairs."""
    (groups, max_budget), total, device = best.shape, len(features), features.device
    covered, covered_new = torch.zeros(2, total, device=device, dtype=torch.float32).unbind()
    columns = torch.empty(total, dtype=torch.int64, device=device)
    count = torch.zeros(groups, dtype=torch.int32, device=device)
    gains = torch.empty(total, dtype=torch.float64, device=device)
    value = torch.zeros(total, device=device, dtype=torch.float32)
    few, tiles = blocks(offsets, total, ROWS), blocks(offsets, total, _TILE)
    weight, kind = own if weights is None else weights, {"WEIGHTED": weights is not None, "ADD": add}
    wide = {"D": features.shape[1], "BLOCK_D": column_block(features.shape[1]), "BLOCK_M": ROWS}
    for step in range(max_budget + 1):
        if step:
            _first_tied[(len(few[0]),)](
                features, *features.stride(), factor, value, weight, *few, offsets, limit, best, picked, max_budget,
                step, groups, **kind, **wide,
            )  # fmt: skip
        if step == max_budget:
            break
        if step:
            _cover[(len(few[0]),)](
                features, *features.stride(), factor, own, covered, covered_new, *few, offsets, limit, best, picked,
                max_budget, step, groups, _GRID, **wide,
            )  # fmt: skip
            _raised[(groups,)](covered, covered_new, columns, count, offsets, limit, step, BLOCK_N=_SCAN, num_warps=16)
        _change[(len(tiles[0]),)](
            features, *features.stride(), factor, own, weight, covered, covered_new, columns, count, gains, value,
            *tiles, offsets, limit, best, picked, max_budget, step, groups, _GRID, **kind, IS_FIRST=step == 0,
            D=features.shape[1], BLOCK_D=64 if features.element_size() == 2 else 32, BLOCK_N=_TILE,
        )  # fmt: skip
        if step:
            covered, covered_new = covered_new, covered
