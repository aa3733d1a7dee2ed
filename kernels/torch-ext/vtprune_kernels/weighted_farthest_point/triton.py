# SPDX-License-Identifier: Apache-2.0
"""Farthest-point selection on a GPU.

If the cosine matrix of a group fits into the memory limit, it is computed first, and one program per group makes all
picks. Longer groups take one launch per pick: each block of rows updates its distances with the last pick, mostly from
precomputed products (`_triton_window`), and the next pick is an atomic maximum of integer keys, which does not depend
on the execution order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._ragged import factors, plan
from .._triton import NOTHING, blocks, key_row, power_of_two, rank_key
from .._triton_pairs import groups_at_once, pairs, side_of
from .._triton_rows import ROWS, column_block, lengths, picks, products, rows_of
from .._triton_window import Window


@triton.jit(do_not_specialize=["first_group", "max_budget"])
def _choose(
    matrix_ptr, weights_ptr, stride_w, offsets_ptr, budget_ptr, order_ptr, max_budget, first_group, side,
    WEIGHTED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Makes all picks of one group; without `WEIGHTED`, `weights_ptr` holds values for the first pick only."""
    group = first_group + tl.program_id(0)
    start, stop = tl.load(offsets_ptr + group), tl.load(offsets_ptr + group + 1)
    cols = tl.arange(0, BLOCK_N)
    mask = cols < stop - start
    matrix_ptr += tl.program_id(0).to(tl.int64) * side * side
    weight = tl.load(weights_ptr + (start + cols) * stride_w, mask=mask, other=0.0).to(tl.float32)
    distance = tl.full([BLOCK_N], float("inf"), tl.float32)
    value = weight
    for step in range(tl.load(budget_ptr + group)):
        key = tl.where(mask & (distance > -float("inf")), rank_key(value, cols), -0x7FFFFFFFFFFFFFFF)
        pivot = key_row(tl.max(key, 0))
        tl.store(order_ptr + group * max_budget + step, start + pivot)
        distance = tl.minimum(distance, 1 - tl.load(matrix_ptr + pivot * side + cols, mask=cols < side, other=0.0))
        distance = tl.where(cols == pivot, -float("inf"), distance)
        value = distance
        if WEIGHTED:
            value = weight * tl.where(distance > -float("inf"), distance, 0.0)


@triton.jit(do_not_specialize=["side", "max_budget", "step"])
def _pick(
    x_ptr, stride_xm, stride_xd, factor_ptr, weights_ptr, stride_w, distance_ptr, values_ptr, block_group_ptr,
    block_start_ptr, offsets_ptr, budget_ptr, best_ptr, slots_ptr, missed_ptr, products_ptr, side, max_length,
    max_budget, step, n_groups,
    WEIGHTED: tl.constexpr, IS_FIRST: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Updates distances with pick `step - 1`, and the key of pick `step`; `IS_FIRST` uses the weights only."""
    group = tl.load(block_group_ptr + tl.program_id(0))
    if group >= n_groups:
        return
    if step >= tl.load(budget_ptr + group):
        return
    start, stop = tl.load(offsets_ptr + group), tl.load(offsets_ptr + group + 1)
    rows = tl.load(block_start_ptr + tl.program_id(0)) + tl.arange(0, BLOCK_M)
    row_mask = rows < stop
    value = tl.full([BLOCK_M], 1.0, tl.float32)
    if WEIGHTED or IS_FIRST:
        value = tl.load(weights_ptr + rows * stride_w, mask=row_mask, other=0.0).to(tl.float32)
    free = row_mask
    if not IS_FIRST:
        pivot = start + key_row(tl.load(best_ptr + group * max_budget + step - 1))
        slot = tl.load(slots_ptr + pivot)
        if slot >= 0:
            line_ptr = products_ptr + (group.to(tl.int64) * side + slot) * max_length
            cosine = tl.load(line_ptr + rows - start, mask=row_mask, other=0.0)
        else:
            tl.store(missed_ptr + group, 1)
            scale = tl.load(factor_ptr + rows, mask=row_mask, other=0.0) * tl.load(factor_ptr + pivot)
            dot = products(x_ptr, stride_xm, stride_xd, rows, row_mask, pivot, D, BLOCK_D)
            cosine = tl.where(scale == 0, 0.0, dot * scale)
        distance = tl.minimum(tl.load(distance_ptr + rows, mask=row_mask, other=0.0), 1 - cosine)
        distance = tl.where(rows == pivot, -float("inf"), distance)
        tl.store(distance_ptr + rows, distance, mask=row_mask)
        free = row_mask & (distance > -float("inf"))
        value = value * tl.where(free, distance, 0.0)
        tl.store(values_ptr + rows, tl.where(free, value, -float("inf")), mask=row_mask)
    key = tl.where(free, rank_key(value, rows - start), -0x7FFFFFFFFFFFFFFF)
    tl.atomic_max(best_ptr + group * max_budget + step, tl.max(key, 0))


def weighted_farthest_point(
    features: Tensor,
    weights: Tensor | None,
    offsets: Tensor,
    budgets: Tensor,
    max_budget: int | None = None,
    max_length: int | None = None,
) -> Tensor:
    """See `vtprune_kernels.weighted_farthest_point`."""
    device, groups = features.device, len(budgets)
    offsets, limit, max_budget, max_length = plan(offsets, budgets, len(features), device, max_budget, max_length)
    order = torch.full((groups, max_budget), -1, dtype=torch.int64, device=device)
    if max_budget == 0 or max_length == 0:
        return order
    factor = factors(lengths(features))
    # Without weights, the first pick is the row whose nearest other row is farthest away.
    nearest, value = None, weights
    if value is None:
        nearest = value = torch.full((len(features),), torch.inf, device=device, dtype=torch.float32)
    together = groups_at_once(max_length, groups)
    if not together:
        if nearest is not None:
            pairs(features, factor, offsets, max_length, 0, groups, None, nearest)
        window = Window(features, factor, offsets, limit, max_length)
        return _stream(window, value, weights is not None, max_budget)
    side = side_of(max_length)
    matrix = torch.empty(together, side, side, device=device, dtype=torch.float32)
    for first in range(0, groups, together):
        count = min(together, groups - first)
        pairs(features, factor, offsets, max_length, first, count, matrix, nearest)
        _choose[(count,)](
            matrix, value, value.stride(0), offsets, limit, order, max_budget, first, side,
            WEIGHTED=weights is not None, BLOCK_N=power_of_two(side), num_warps=8,
        )  # fmt: skip
    return order


def _stream(window: Window, value: Tensor, weighted: bool, max_budget: int) -> Tensor:
    """Selects from groups that are too long for a matrix of all pairs; the first pick has the largest `value`."""
    features, offsets, limit = window.features, window.offsets, window.limit
    total, groups, device = len(features), len(limit), features.device
    best = torch.full((groups, max_budget), NOTHING, dtype=torch.int64, device=device)
    nearest = torch.full((total,), torch.inf, device=device, dtype=torch.float32)
    values = torch.empty_like(nearest)
    owner, first = blocks(offsets, total, ROWS)
    for step in range(max_budget):
        if step:
            window.renew(values, step)
        _pick[(len(owner),)](
            features, *features.stride(), window.factor, value, value.stride(0), nearest, values, owner, first,
            offsets, limit, best, window.slots, window.missed, window.lines, window.side, window.max_length, max_budget,
            step, groups, WEIGHTED=weighted, IS_FIRST=step == 0, D=features.shape[1],
            BLOCK_D=column_block(features.shape[1]), BLOCK_M=ROWS,
        )  # fmt: skip
    return picks(rows_of(best), offsets, limit)
