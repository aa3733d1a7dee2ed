# SPDX-License-Identifier: Apache-2.0
"""Progressive chunked MMR on a GPU for groups too long for a matrix of all pairs, in a few launches per round.

A round ranks all rows, computes the similarities of the candidates, selects from them, and updates the largest
similarity of every row to the selected ones, in blocks. Selected rows have infinite similarity.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import NOTHING, key_row, power_of_two, rank_key
from .triton_similarity import Updates, tile

_PICKS = 16  # selected rows per tile of similarities


@triton.jit
def gain(relevance, max_sim, duplication, LOG: tl.constexpr):
    """Value of a row, given its largest similarity to the selected ones."""
    max_sim = tl.where(max_sim < float("inf"), max_sim, 0.0)
    if LOG:
        return relevance + 0.5 * tl.log(1 - duplication * max_sim * max_sim + 1e-6)
    return relevance - duplication * max_sim


@triton.jit(do_not_specialize=["max_budget", "done", "count", "max_length"])
def _update(
    k_ptr, v_ptr, shift_ptr, half_sq_ptr, inv_norm_ptr, scaling, stride_kn, stride_kh, stride_kd, stride_vn, stride_vh,
    stride_vd, max_sim_ptr, relevance_ptr, stride_r, ranks_ptr, offsets_ptr, budget_ptr, order_ptr, max_budget, done,
    count, max_length, duplication,
    LOG: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_SHIFT: tl.constexpr, KV_HEADS: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Updates the largest similarities of a block of rows to the selected ones, and the rank keys of the rows."""
    group, offs_m = tl.program_id(1), tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    start, stop = tl.load(offsets_ptr + group), tl.load(offsets_ptr + group + 1)
    if start + tl.program_id(0) * BLOCK_M >= stop:
        return
    rows = start + offs_m
    row_mask = rows < stop
    max_sim = tl.load(max_sim_ptr + rows, mask=row_mask, other=0.0)
    n_picks = tl.minimum(count, tl.load(budget_ptr + group) - done).to(tl.int32)
    for start_n in range(0, n_picks, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        pick_mask = offs_n < n_picks
        picks = tl.load(order_ptr + group * max_budget + done + offs_n, mask=pick_mask, other=0)
        similarity = tile(
            k_ptr, v_ptr, shift_ptr, half_sq_ptr, inv_norm_ptr, scaling, stride_kn, stride_kh, stride_kd, stride_vn,
            stride_vh, stride_vd, rows, row_mask, picks, pick_mask, HAS_SHIFT, KV_HEADS, DK, DV, BLOCK_D,
        )  # fmt: skip
        similarity = tl.where((rows[:, None] == picks[None, :]) & pick_mask[None, :], float("inf"), similarity)
        max_sim = tl.maximum(max_sim, tl.max(tl.where(pick_mask[None, :], similarity, 0.0), 1))
    tl.store(max_sim_ptr + rows, max_sim, mask=row_mask)
    score = tl.load(relevance_ptr + rows * stride_r, mask=row_mask, other=0.0).to(tl.float32)
    key = rank_key(gain(score, max_sim, duplication, LOG), offs_m)
    key = tl.where(max_sim < float("inf"), key, -0x7FFFFFFFFFFFFFFF)
    tl.store(ranks_ptr + group.to(tl.int64) * max_length + offs_m, key, mask=row_mask)


@triton.jit(do_not_specialize=["max_budget", "done", "count", "side"])
def _pick(
    relevance_ptr, stride_r, max_sim_ptr, best_ptr, similarity_ptr, offsets_ptr, budget_ptr, order_ptr, max_budget,
    done, count, side, duplication,
    LOG: tl.constexpr, GREEDY: tl.constexpr, PER_PICK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Selects the rows of one group's round from its candidates, whose keys are sorted in descending order."""
    group, slots = tl.program_id(0), tl.arange(0, BLOCK_N)
    start = tl.load(offsets_ptr + group)
    n_picks = tl.minimum(count, tl.load(budget_ptr + group) - done)
    key = tl.load(best_ptr + group * side + slots, mask=slots < side, other=-0x7FFFFFFFFFFFFFFF)
    valid = (slots < PER_PICK * n_picks) & (key != -0x7FFFFFFFFFFFFFFF)
    rows = start + key_row(key)
    out_ptr = order_ptr + group * max_budget + done
    if GREEDY:
        max_sim = tl.load(max_sim_ptr + rows, mask=valid, other=0.0)
        score = tl.load(relevance_ptr + rows * stride_r, mask=valid, other=0.0).to(tl.float32)
        similarity_ptr += group.to(tl.int64) * side * side
        for step in range(n_picks):
            value = rank_key(gain(score, max_sim, duplication, LOG), rows - start)
            pivot = start + key_row(tl.max(tl.where(valid, value, -0x7FFFFFFFFFFFFFFF), 0))
            tl.store(out_ptr + step, pivot)
            pivot_slot = tl.max(tl.where(valid & (rows == pivot), slots, 0), 0)
            valid = valid & (slots != pivot_slot)
            max_sim = tl.maximum(max_sim, tl.load(similarity_ptr + pivot_slot * side + slots, mask=valid, other=0.0))
    else:
        tl.store(out_ptr + slots, rows, mask=slots < n_picks)


class Rounds:
    """State of the selection in all groups.

    Args:
        updates: Rank-one updates of the rows, which define the similarity.
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
        self.near = torch.zeros(len(relevance), device=relevance.device, dtype=torch.float32)
        self.order = torch.full((len(limit), max_budget), -1, dtype=torch.int64, device=relevance.device)

    def _update(self, done: int, count: int, ranks: Tensor) -> None:
        rows = self.updates.tile
        _update[(triton.cdiv(self.max_length, rows), len(self.limit))](
            *self.updates.tensors, self.near, self.relevance, self.relevance.stride(0), ranks, self.offsets, self.limit,
            self.order, self.order.shape[1], done, count, self.max_length, self.duplication, LOG=self.log, BLOCK_M=rows,
            BLOCK_N=_PICKS, num_warps=8, num_stages=1, **self.updates.sizes,
        )  # fmt: skip

    def choose(self, chunk: int, growth: float, pool: int) -> Tensor:
        """Selects rows `[S, max_budget]`, returned in order of selection."""
        (groups, max_budget), done = self.order.shape, 0
        ranks = torch.full((groups, self.max_length), NOTHING, dtype=torch.int64, device=self.near.device)
        self._update(0, 0, ranks)
        while done < max_budget:
            count = min(max_budget - done, chunk, max(1, int(growth * done)))
            per_pick = pool if count > 1 else 1
            side = min(per_pick * count, self.max_length)
            best = ranks.amax(1, keepdim=True) if side == 1 else ranks.topk(side).values  # [S, side]
            similarity = self.near
            if greedy := per_pick > 1:
                rows = self.offsets[:-1, None] + 0x7FFFFFFF - (best & 0x7FFFFFFF)
                similarity = torch.empty(groups, side, side, device=self.near.device, dtype=torch.float32)
                self.updates.matrix(self.offsets, 0, similarity, torch.where(best == NOTHING, -1, rows))
            _pick[(groups,)](
                self.relevance, self.relevance.stride(0), self.near, best, similarity, self.offsets, self.limit,
                self.order, max_budget, done, count, side, self.duplication, LOG=self.log, GREEDY=greedy,
                PER_PICK=per_pick, BLOCK_N=power_of_two(side),
            )  # fmt: skip
            if done + count < max_budget:
                self._update(done, count, ranks)
            done += count
        return self.order
