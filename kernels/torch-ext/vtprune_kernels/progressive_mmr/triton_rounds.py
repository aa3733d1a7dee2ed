# SPDX-License-Identifier: Apache-2.0
"""Progressive chunked MMR on a GPU for groups that are too long for a matrix of all pairs: a few launches per round.

A round ranks all rows, compares the candidates with each other, selects from them, and updates the largest similarities
of all rows, in blocks, with the rows selected in the round. A selected row gets infinite similarity.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import NOTHING, key_row, power_of_two, rank_key
from .triton_similarity import Updates, tile

_PICKS = 16  # selected rows that a block is compared with at a time


@triton.jit
def gain(relevance, near, duplication, LOG: tl.constexpr):
    """Value of a row, given its largest similarity to the selected ones."""
    near = tl.where(near < float("inf"), near, 0.0)
    if LOG:
        return relevance + 0.5 * tl.log(1 - duplication * near * near + 1e-6)
    return relevance - duplication * near


@triton.jit(do_not_specialize=["max_budget", "done", "count", "max_length"])
def _update(
    keys, values, shift, halves, inverses, scaling, key_row_stride, key_head, key_column, value_row, value_head,
    value_column, near, relevance, relevance_stride, ranks, offsets, limit, order, max_budget, done, count, max_length,
    duplication, PRESELECTED: tl.constexpr, RANK: tl.constexpr, LOG: tl.constexpr, ROWS: tl.constexpr,
    PICKS: tl.constexpr, SHIFT: tl.constexpr, KV_HEADS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    PART: tl.constexpr,
):  # fmt: skip
    """Updates the largest similarities of a block of rows with the last round's rows, and with `RANK` their rank keys.

    With `PRESELECTED`, the block is compared with the rows that are marked in `order` instead.
    """
    group, place = tl.program_id(1), tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    start, stop = tl.load(offsets + group), tl.load(offsets + group + 1)
    if start + tl.program_id(0) * ROWS >= stop:
        return
    rows = start + place
    inside = rows < stop
    closest = tl.load(near + rows, mask=inside, other=0.0)
    number = (
        (stop - start).to(tl.int32) if PRESELECTED else tl.minimum(count, tl.load(limit + group) - done).to(tl.int32)
    )
    for begin in range(0, number, PICKS):
        slot = begin + tl.arange(0, PICKS)
        known = slot < number
        if PRESELECTED:
            picks = start + slot
            known = tl.load(order + picks, mask=known, other=0) != 0
        else:
            picks = tl.load(order + group * max_budget + done + slot, mask=known, other=0)
        if tl.max(known.to(tl.int32), 0) > 0:
            similar = tile(
                keys, values, shift, halves, inverses, scaling, key_row_stride, key_head, key_column, value_row,
                value_head, value_column, rows, inside, picks, known, SHIFT, KV_HEADS, DK, DV, PART,
            )  # fmt: skip
            similar = tl.where((rows[:, None] == picks[None, :]) & known[None, :], float("inf"), similar)
            closest = tl.maximum(closest, tl.max(tl.where(known[None, :], similar, 0.0), 1))
    tl.store(near + rows, closest, mask=inside)
    if RANK:
        score = tl.load(relevance + rows * relevance_stride, mask=inside, other=0.0).to(tl.float32)
        key = rank_key(gain(score, closest, duplication, LOG), place)
        key = tl.where(closest < float("inf"), key, -0x7FFFFFFFFFFFFFFF)
        tl.store(ranks + group.to(tl.int64) * max_length + place, key, mask=inside)


@triton.jit(do_not_specialize=["max_budget", "done", "count", "side"])
def _pick(
    relevance, relevance_stride, near, best, similarity, offsets, limit, order, max_budget, done, count, side,
    duplication, LOG: tl.constexpr, GREEDY: tl.constexpr, PER_PICK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Selects the rows of one group's round from its candidates, whose keys are sorted, best first."""
    group, slot = tl.program_id(0), tl.arange(0, BLOCK)
    start = tl.load(offsets + group)
    number = tl.minimum(count, tl.load(limit + group) - done)
    key = tl.load(best + group * side + slot, mask=slot < side, other=-0x7FFFFFFFFFFFFFFF)
    valid = (slot < PER_PICK * number) & (key != -0x7FFFFFFFFFFFFFFF)
    rows = start + key_row(key)
    result = order + group * max_budget + done
    if GREEDY:
        closest = tl.load(near + rows, mask=valid, other=0.0)
        score = tl.load(relevance + rows * relevance_stride, mask=valid, other=0.0).to(tl.float32)
        similarity += group.to(tl.int64) * side * side
        for step in range(number):
            value = rank_key(gain(score, closest, duplication, LOG), rows - start)
            one = start + key_row(tl.max(tl.where(valid, value, -0x7FFFFFFFFFFFFFFF), 0))
            tl.store(result + step, one)
            here = tl.max(tl.where(valid & (rows == one), slot, 0), 0)
            valid = valid & (slot != here)
            closest = tl.maximum(closest, tl.load(similarity + here * side + slot, mask=valid, other=0.0))
    else:
        tl.store(result + slot, rows, mask=slot < number)


class Rounds:
    """State of the selection in all groups.

    Args:
        updates: Rank-one updates of the rows, by which they are compared.
        relevance: `[M]`.
        offsets, limit: `[S + 1]` offsets, and `[S]` number of rows to select from each group.
        max_budget: Largest number of rows to select from a group.
        max_length: Length of the longest group, or more.
        duplication, log: The objective.

    Attributes:
        near: `[M]` largest similarity to a selected row, at least 0; infinite for selected rows.
        order: `[S, max_budget]` int64 selected rows, padded with -1.
    """

    def __init__(
        self,
        updates: Updates,
        relevance: Tensor,
        offsets: Tensor,
        limit: Tensor,
        max_budget: int,
        max_length: int,
        duplication: float,
        log: bool,
    ) -> None:
        self.updates, self.relevance, self.offsets, self.limit = updates, relevance, offsets, limit
        self.max_length, self.duplication, self.log = max_length, duplication, log
        self.near = torch.zeros(len(relevance), device=relevance.device)
        self.order = torch.full((len(limit), max_budget), -1, dtype=torch.int64, device=relevance.device)

    def add_preselected(self, preselected: Tensor) -> None:
        """Counts the rows that are marked in `preselected` `[M]` uint8 as selected."""
        self._update(0, 0, preselected, None)

    def _update(self, done: int, count: int, preselected: Tensor | None, ranks: Tensor | None) -> None:
        rows = self.updates.tile
        _update[(triton.cdiv(self.max_length, rows), len(self.limit))](
            *self.updates.tensors, self.near, self.relevance, self.relevance.stride(0),
            self.order if ranks is None else ranks, self.offsets, self.limit,
            self.order if preselected is None else preselected, self.order.shape[1], done, count, self.max_length,
            self.duplication, PRESELECTED=preselected is not None, RANK=ranks is not None, LOG=self.log, ROWS=rows,
            PICKS=_PICKS, num_warps=8, num_stages=1, **self.updates.sizes,
        )  # fmt: skip

    def choose(self, chunk: int, growth: float, pool: int) -> Tensor:
        """Selects rows `[S, max_budget]`, returned in order of selection."""
        (groups, max_budget), done = self.order.shape, 0
        ranks = torch.full((groups, self.max_length), NOTHING, dtype=torch.int64, device=self.near.device)
        self._update(0, 0, None, ranks)
        while done < max_budget:
            count = min(max_budget - done, chunk, max(1, int(growth * done)))
            per_pick = pool if count > 1 else 1
            side = min(per_pick * count, self.max_length)
            best = ranks.amax(1, keepdim=True) if side == 1 else ranks.topk(side).values  # [S, side]
            similarity = self.near
            if greedy := per_pick > 1:
                rows = self.offsets[:-1, None] + 0x7FFFFFFF - (best & 0x7FFFFFFF)
                similarity = torch.empty(groups, side, side, device=self.near.device)
                self.updates.matrix(self.offsets, 0, similarity, torch.where(best == NOTHING, -1, rows))
            _pick[(groups,)](
                self.relevance, self.relevance.stride(0), self.near, best, similarity, self.offsets, self.limit,
                self.order, max_budget, done, count, side, self.duplication, LOG=self.log, GREEDY=greedy,
                PER_PICK=per_pick, BLOCK=power_of_two(side),
            )  # fmt: skip
            if done + count < max_budget:
                self._update(done, count, None, ranks)
            done += count
        return self.order
