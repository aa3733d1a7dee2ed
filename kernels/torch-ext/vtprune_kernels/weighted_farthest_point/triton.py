# SPDX-License-Identifier: Apache-2.0
"""Farthest-point selection on a GPU.

If the cosines of all pairs of a group fit into the allowed memory, they are computed first, and one program per group
makes all picks. Longer groups take one launch per pick: each block of rows updates its distances with the last pick,
mostly from products that were computed ahead, and raises the key of the next pick to its best one: a maximum of
integers, which is the same in every order of execution.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._ragged import plan
from .._triton import NOTHING, blocks, key_row, power_of_two, rank_key
from .._triton_pairs import groups_at_once, pairs, side_of
from .._triton_rows import ROWS, column_block, decode, factors, lengths, products
from .._triton_window import Window


@triton.jit(do_not_specialize=["first", "max_budget"])
def _choose(
    matrix, weights, weight_stride, offsets, limit, order, max_budget, first, side,
    WEIGHTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Makes all picks of one group; without `WEIGHTED`, `weights` are values for the first pick only."""
    group = first + tl.program_id(0)
    start, stop = tl.load(offsets + group), tl.load(offsets + group + 1)
    place = tl.arange(0, BLOCK)
    inside = place < stop - start
    matrix += tl.program_id(0).to(tl.int64) * side * side
    weight = tl.load(weights + (start + place) * weight_stride, mask=inside, other=0.0).to(tl.float32)
    near = tl.full([BLOCK], float("inf"), tl.float32)
    value = weight
    for step in range(tl.load(limit + group)):
        key = tl.where(inside & (near > -float("inf")), rank_key(value, place), -0x7FFFFFFFFFFFFFFF)
        one = key_row(tl.max(key, 0))
        tl.store(order + group * max_budget + step, start + one)
        near = tl.minimum(near, 1 - tl.load(matrix + one * side + place, mask=place < side, other=0.0))
        near = tl.where(place == one, -float("inf"), near)
        value = near
        if WEIGHTED:
            value = weight * tl.where(near > -float("inf"), near, 0.0)


@triton.jit(do_not_specialize=["side", "max_budget", "step"])
def _pick(
    features, row_stride, column_stride, factor, weights, weight_stride, nearest, values, owner, first, offsets, limit,
    best, slots, missed, lines, side, max_length, max_budget, step, groups, WEIGHTED: tl.constexpr, START: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Updates distances with pick `step - 1`, and the key of pick `step`; with `START` the first, by `weights` only."""
    group = tl.load(owner + tl.program_id(0))
    if group >= groups:
        return
    if step >= tl.load(limit + group):
        return
    start, stop = tl.load(offsets + group), tl.load(offsets + group + 1)
    rows = tl.load(first + tl.program_id(0)) + tl.arange(0, ROWS)
    inside = rows < stop
    value = tl.full([ROWS], 1.0, tl.float32)
    if WEIGHTED or START:
        value = tl.load(weights + rows * weight_stride, mask=inside, other=0.0).to(tl.float32)
    free = inside
    if not START:
        one = start + key_row(tl.load(best + group * max_budget + step - 1))
        slot = tl.load(slots + one)
        if slot >= 0:
            line = lines + (group.to(tl.int64) * side + slot) * max_length
            cosine = tl.load(line + rows - start, mask=inside, other=0.0)
        else:
            tl.store(missed + group, 1)
            scale = tl.load(factor + rows, mask=inside, other=0.0) * tl.load(factor + one)
            total = products(features, row_stride, column_stride, rows, inside, one, WIDTH, BLOCK)
            cosine = tl.where(scale == 0, 0.0, total * scale)
        near = tl.minimum(tl.load(nearest + rows, mask=inside, other=0.0), 1 - cosine)
        near = tl.where(rows == one, -float("inf"), near)
        tl.store(nearest + rows, near, mask=inside)
        free = inside & (near > -float("inf"))
        value = value * tl.where(free, near, 0.0)
        tl.store(values + rows, tl.where(free, value, -float("inf")), mask=inside)
    key = tl.where(free, rank_key(value, rows - start), -0x7FFFFFFFFFFFFFFF)
    tl.atomic_max(best + group * max_budget + step, tl.max(key, 0))


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
        nearest = value = torch.full((len(features),), torch.inf, device=device)
    together = groups_at_once(max_length, groups)
    if not together:
        if nearest is not None:
            pairs(features, factor, offsets, max_length, 0, groups, None, nearest)
        window = Window(features, factor, offsets, limit, max_length)
        return _stream(window, value, weights is not None, max_budget)
    side = side_of(max_length)
    matrix = torch.empty(together, side, side, device=device)
    for first in range(0, groups, together):
        count = min(together, groups - first)
        pairs(features, factor, offsets, max_length, first, count, matrix, nearest)
        _choose[(count,)](
            matrix, value, value.stride(0), offsets, limit, order, max_budget, first, side,
            WEIGHTED=weights is not None, BLOCK=power_of_two(side), num_warps=8,
        )  # fmt: skip
    return order


def _stream(window: Window, value: Tensor, weighted: bool, max_budget: int) -> Tensor:
    """Selects from groups that are too long for a matrix of all pairs; the first pick has the largest `value`."""
    features, offsets, limit = window.features, window.offsets, window.limit
    total, groups, device = len(features), len(limit), features.device
    best = torch.full((groups, max_budget), NOTHING, dtype=torch.int64, device=device)
    nearest = torch.full((total,), torch.inf, device=device)
    values = torch.empty_like(nearest)
    owner, first = blocks(offsets, total, ROWS)
    for step in range(max_budget):
        if step:
            window.renew(values, step)
        _pick[(len(owner),)](
            features, *features.stride(), window.factor, value, value.stride(0), nearest, values, owner, first,
            offsets, limit, best, window.slots, window.missed, window.lines, window.side, window.max_length, max_budget,
            step, groups, WEIGHTED=weighted, START=step == 0, WIDTH=features.shape[1],
            BLOCK=column_block(features.shape[1]), ROWS=ROWS,
        )  # fmt: skip
    return decode(best, offsets, limit)
