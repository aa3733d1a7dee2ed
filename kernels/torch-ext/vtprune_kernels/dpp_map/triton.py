# SPDX-License-Identifier: Apache-2.0
"""Greedy MAP of a conditional DPP on a GPU: one launch a pick, which adds one row to the Cholesky factor.

Gains are read from one buffer and written to another, so that no block sees another's new value; the next pick is a
maximum of integers, the same in every order of execution.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._ragged import finite, output_width, self_cosine
from .._triton import blocks, key_row, rank_key
from .._triton_rows import ROWS, column_block, decode, factors, lengths, products
from .naive import EXHAUSTED

_NOTHING = -(1 << 63) + 1


@triton.jit(do_not_specialize=["width", "step"])
def _pick(
    features, row_stride, column_stride, factor, variance, left, left_new, cholesky, total, owner, first, segments,
    limit, best, width, step, pools, exhausted, START: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Row `step - 1` of the factor, and the key of pick `step`."""
    pool = tl.load(owner + tl.program_id(0))
    if pool >= pools:
        return
    if step >= tl.load(limit + pool):
        return
    start, stop = tl.load(segments + pool), tl.load(segments + pool + 1)
    rows = tl.load(first + tl.program_id(0)) + tl.arange(0, ROWS)
    inside = rows < stop
    own = tl.load(variance + rows, mask=inside, other=0.0)
    gain = tl.load(left + rows, mask=inside, other=-float("inf"))
    if not START:
        key = tl.load(best + pool * width + step - 1)
        one = start + key_row(key)
        scale = tl.load(factor + rows, mask=inside, other=0.0) * tl.load(factor + one)
        row = products(features, row_stride, column_stride, rows, inside, one, WIDTH, BLOCK)
        row = tl.where(scale == 0, 0.0, row * scale)
        at = tl.zeros([], tl.int64)
        for _ in range(step - 1):
            row -= tl.load(cholesky + at + one) * tl.load(cholesky + at + rows, mask=inside, other=0.0)
            at += total
        # A key below zero is a row that the chosen ones explain: there is nothing to divide by, and nothing to add.
        row = tl.where(key < 0, 0.0, row / tl.sqrt(tl.load(left + one)))
        tl.store(cholesky + at + rows, row, mask=inside)
        gain = tl.where(rows == one, -float("inf"), gain - row * row)
        tl.store(left_new + rows, gain, mask=inside)
    place = rows - start
    # Explained rows come after all others, by their own variance: its bits, moved below zero.
    low = (own.to(tl.int32, bitcast=True).to(tl.int64) - 0x80000000) << 32
    key = tl.where(gain > exhausted * own, rank_key(gain, place), low | (0x7FFFFFFF - place).to(tl.int64))
    key = tl.where(gain > -float("inf"), key, -0x7FFFFFFFFFFFFFFF)
    tl.atomic_max(best + pool * width + step, tl.max(key, 0))


def dpp_map(features: Tensor, relevance: Tensor, segments: Tensor, budgets: Tensor, width: int | None = None) -> Tensor:
    """See `vtprune_kernels.dpp_map`."""
    width, device, total = output_width(budgets, width), features.device, len(features)
    segments, budgets = segments.to(device), budgets.to(device)
    limit, pools = torch.minimum(budgets, segments.diff()), len(budgets)
    best = torch.full((pools, width), _NOTHING, dtype=torch.int64, device=device)
    if width and total:
        length = lengths(features)
        relevance = torch.nan_to_num(relevance.float(), nan=0.0, posinf=0.0, neginf=0.0)
        factor, variance = factors(length) * relevance, finite(self_cosine(length) * relevance.square())
        left, left_new = variance.clone(), variance.clone()
        cholesky = torch.zeros(width, total, device=device)
        owner, first = blocks(segments, total, ROWS)
        for step in range(width):
            _pick[(len(owner),)](
                features, *features.stride(), factor, variance, left, left_new, cholesky, total, owner, first, segments,
                limit, best, width, step, pools, EXHAUSTED, START=step == 0, WIDTH=features.shape[1],
                BLOCK=column_block(features.shape[1]), ROWS=ROWS,
            )  # fmt: skip
            if step:
                left, left_new = left_new, left
    return decode(best, segments, limit)
