# SPDX-License-Identifier: Apache-2.0
"""Progressive chunked maximal marginal relevance on a GPU: two launches a round, one number of state per row.

A round first chooses (one program per pool: the best candidates, then greedily among them), then brings the largest
similarities up to date (one program per block of rows). Distances are sums of squared differences, so that
nothing is cancelled. A chosen row has infinite similarity.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._ragged import output_width
from .._triton import blocks, key_row, power_of_two, rank_key

_ROWS, _SCAN = 32, 1024


@triton.jit
def _similarity(
    keys, values, key_row_stride, key_group, key_column, value_row, value_group, value_column, rows, valid, one,
    scaling, GROUPS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, DK_BLOCK: tl.constexpr, DV_BLOCK: tl.constexpr,
):  # fmt: skip
    """Similarity of `rows` with the row `one`, mean over the KV heads."""
    k, v = tl.arange(0, DK_BLOCK), tl.arange(0, DV_BLOCK)
    rows, one = rows.to(tl.int64), one.to(tl.int64)
    total = tl.zeros(rows.shape, tl.float32)
    for group in range(GROUPS):
        at = group * key_group + k * key_column
        other = tl.load(keys + one * key_row_stride + at, mask=k < DK, other=0.0).to(tl.float32)
        mask = valid[:, None] & (k < DK)[None, :]
        mine = tl.load(keys + rows[:, None] * key_row_stride + at[None, :], mask=mask, other=0.0).to(tl.float32)
        difference = tl.where(mask, mine - other[None, :], 0.0)
        distance = tl.sum(difference * difference, 1)
        at = group * value_group + v * value_column
        other = tl.load(values + one * value_row + at, mask=v < DV, other=0.0).to(tl.float32)
        mask = valid[:, None] & (v < DV)[None, :]
        mine = tl.load(values + rows[:, None] * value_row + at[None, :], mask=mask, other=0.0).to(tl.float32)
        length = tl.maximum(tl.sqrt(tl.sum(mine * mine, 1)), 1e-6) * tl.maximum(tl.sqrt(tl.sum(other * other, 0)), 1e-6)
        total += tl.exp(-0.5 * scaling * distance) * tl.sum(mine * other[None, :], 1) / length
    return total / GROUPS


@triton.jit
def _gain(relevance, closest, duplication, LOG: tl.constexpr):
    if LOG:
        return relevance + 0.5 * tl.log(1 - duplication * closest * closest + 1e-6)
    return relevance - duplication * closest


@triton.jit(do_not_specialize=["width", "done", "count"])
def _choose(
    relevance, relevance_stride, closest, keys, values, segments, budgets, order, width, done, count, duplication,
    scaling, key_row_stride, key_group, key_column, value_row, value_group, value_column,
    POOL: tl.constexpr, SINGLE: tl.constexpr, GREEDY: tl.constexpr, SCAN: tl.constexpr, LOG: tl.constexpr,
    GROUPS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, DK_BLOCK: tl.constexpr, DV_BLOCK: tl.constexpr,
    PER_PICK: tl.constexpr,
):  # fmt: skip
    """One round of one pool: the `PER_PICK * count` best rows, and the greedy choice of `count` among them."""
    pool = tl.program_id(0)
    start, stop = tl.load(segments + pool), tl.load(segments + pool + 1)
    count = tl.minimum(count, tl.load(budgets + pool) - done)
    if count <= 0:
        return
    nothing = tl.full([], -0x7FFFFFFFFFFFFFFF, tl.int64)
    best = tl.zeros([POOL], tl.int64) + nothing
    for first in range(start, stop, SCAN):
        place = first + tl.arange(0, SCAN)
        inside = place < stop
        near = tl.load(closest + place, mask=inside, other=float("inf"))
        free = near < float("inf")
        score = tl.load(relevance + place * relevance_stride, mask=inside, other=0.0).to(tl.float32)
        value = _gain(score, tl.where(free, near, 0.0), duplication, LOG)
        key = tl.where(free, rank_key(value, place - start), nothing)
        if SINGLE:
            best = tl.maximum(best, tl.max(key, 0))
        else:
            best = tl.topk(tl.reshape(tl.join(best, tl.topk(key, POOL)), [2 * POOL]), POOL)
    slot = tl.arange(0, POOL)
    wanted = tl.where(SINGLE, 1, PER_PICK * count)
    valid = (slot < wanted) & (best != nothing)
    rows = tl.where(valid, start + key_row(best), start)
    if GREEDY:
        near = tl.load(closest + rows, mask=valid, other=float("inf"))
        score = tl.load(relevance + rows * relevance_stride, mask=valid, other=0.0).to(tl.float32)
        for step in range(count):
            key = tl.where(valid, rank_key(_gain(score, near, duplication, LOG), rows - start), nothing)
            one = start + key_row(tl.max(key, 0))
            tl.store(order + pool * width + done + step, one)
            valid = valid & (rows != one)
            similar = _similarity(
                keys, values, key_row_stride, key_group, key_column, value_row, value_group, value_column, rows, valid,
                one, scaling, GROUPS, DK, DV, DK_BLOCK, DV_BLOCK,
            )  # fmt: skip
            near = tl.maximum(near, similar)
    else:
        tl.store(order + pool * width + done + slot, rows, mask=slot < count)


@triton.jit(do_not_specialize=["width", "done", "count"])
def _update(
    closest, keys, values, owner, first, segments, budgets, order, width, done, count, carried, pools, scaling,
    key_row_stride, key_group, key_column, value_row, value_group, value_column,
    CARRIED: tl.constexpr, ROWS: tl.constexpr,
    GROUPS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, DK_BLOCK: tl.constexpr, DV_BLOCK: tl.constexpr,
):  # fmt: skip
    """Largest similarity of a block of rows with what this round chose, or with what was carried in."""
    pool = tl.load(owner + tl.program_id(0))
    if pool >= pools:
        return
    start, stop = tl.load(segments + pool), tl.load(segments + pool + 1)
    rows = tl.load(first + tl.program_id(0)) + tl.arange(0, ROWS)
    inside = rows < stop
    near = tl.load(closest + rows, mask=inside, other=0.0)
    if CARRIED:
        for place in range(stop - start):
            one = start + place
            if tl.load(carried + one) != 0:
                similar = _similarity(
                    keys, values, key_row_stride, key_group, key_column, value_row, value_group, value_column, rows,
                    inside, one, scaling, GROUPS, DK, DV, DK_BLOCK, DV_BLOCK,
                )  # fmt: skip
                near = tl.where(rows == one, float("inf"), tl.maximum(near, similar))
    else:
        count = tl.minimum(count, tl.load(budgets + pool) - done)
        for step in range(count):
            one = tl.load(order + pool * width + done + step)
            similar = _similarity(
                keys, values, key_row_stride, key_group, key_column, value_row, value_group, value_column, rows, inside,
                one, scaling, GROUPS, DK, DV, DK_BLOCK, DV_BLOCK,
            )  # fmt: skip
            near = tl.where(rows == one, float("inf"), tl.maximum(near, similar))
    tl.store(closest + rows, near, mask=inside)


def progressive_mmr(
    relevance: Tensor,
    keys: Tensor,
    values: Tensor,
    segments: Tensor,
    budgets: Tensor,
    duplication: float = 0.5,
    chunk: int = 16,
    growth: float = 0.25,
    pool: int = 4,
    objective: str = "linear",
    scaling: float | None = None,
    carried: Tensor | None = None,
    width: int | None = None,
) -> Tensor:
    """See `vtprune_kernels.progressive_mmr`."""
    width, device, (total, groups, dk), dv = output_width(budgets, width), keys.device, keys.shape, values.shape[-1]
    segments, budgets = segments.to(device), budgets.to(device)
    pools = len(budgets)
    order = torch.full((pools, width), -1, dtype=torch.int64, device=device)
    if width == 0 or total == 0:
        return order
    scaling = dk**-0.5 if scaling is None else scaling
    sizes = {"GROUPS": groups, "DK": dk, "DV": dv, "DK_BLOCK": power_of_two(dk), "DV_BLOCK": power_of_two(dv)}
    strides = (*keys.stride(), *values.stride())
    owner, first = blocks(segments, total, _ROWS)
    closest = torch.zeros(total, device=device)
    limit = torch.minimum(budgets, segments.diff())
    update = (closest, keys, values, owner, first, segments)
    if carried is not None:
        carried = carried.to(torch.uint8)
        kept = torch.cat([carried.new_zeros(1, dtype=torch.int64), carried.cumsum(0)])[segments].diff()
        limit = torch.minimum(budgets, segments.diff() - kept)
        _update[(len(owner),)](
            *update, limit, order, width, 0, 0, carried, pools, scaling, *strides, CARRIED=True, ROWS=_ROWS, **sizes
        )
    done = 0
    while done < width:
        count = min(width - done, chunk, max(1, int(growth * done)))
        greedy = pool > 1 and count > 1
        per_pick = pool if greedy else 1
        _choose[(pools,)](
            relevance, relevance.stride(0), closest, keys, values, segments, limit, order, width, done, count,
            duplication, scaling, *strides, POOL=power_of_two(per_pick * count), SINGLE=count == 1, GREEDY=greedy,
            SCAN=max(_SCAN, power_of_two(per_pick * count)), LOG=objective == "log", PER_PICK=per_pick, **sizes,
        )  # fmt: skip
        done += count
        if done < width:
            _update[(len(owner),)](
                *update, limit, order, width, done - count, count, closest, pools, scaling, *strides, CARRIED=False,
                ROWS=_ROWS, **sizes,
            )  # fmt: skip
    return order
