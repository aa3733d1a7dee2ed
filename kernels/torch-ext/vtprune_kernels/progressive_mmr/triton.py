# SPDX-License-Identifier: Apache-2.0
"""Progressive chunked maximal marginal relevance on a GPU.

If the similarity matrix of a group fits into the memory limit, it is computed first, and one program per group runs all
rounds; `triton_rounds` handles longer groups. Selected rows have infinite similarity.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._ragged import plan
from .._triton import key_row, power_of_two, rank_key
from .._triton_pairs import groups_at_once, side_of
from .triton_rounds import Rounds, gain
from .triton_similarity import Updates


@triton.jit
def _largest(key, count):
    """Mask of the `count` largest of distinct int64 keys of `rank_key`."""
    high = (key >> 32).to(tl.int32)
    lo, hi = tl.min(high, 0), tl.max(high, 0)
    n_found = tl.full([], 0x7FFFFFFF, tl.int32)
    # Bisection for the largest value that at least `count` keys reach.
    while (lo < hi) & (n_found != count):
        mid = (lo.to(tl.int64) + (hi.to(tl.int64) - lo.to(tl.int64) + 1) // 2).to(tl.int32)
        n_reaching = tl.sum((high >= mid).to(tl.int32), 0)
        enough = n_reaching >= count
        lo = tl.where(enough, mid, lo)
        n_found = tl.where(enough, n_reaching, n_found)
        hi = tl.where(enough, hi, mid - 1)
    mask = high >= lo
    excess = tl.sum(mask.to(tl.int32), 0) - count
    if excess > 0:  # of equal values, remove the last rows
        equal = high == lo
        mask = mask & (~equal | (tl.cumsum(equal.to(tl.int32), 0) <= tl.sum(equal.to(tl.int32), 0) - excess))
    return mask


@triton.jit(do_not_specialize=["max_budget", "first_group"])
def _choose(
    matrix_ptr, relevance_ptr, stride_r, offsets_ptr, budget_ptr, order_ptr, max_budget, first_group, side, duplication,
    CHUNK: tl.constexpr, GROWTH: tl.constexpr, POOL: tl.constexpr, LOG: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Runs all rounds of one group."""
    group, cols = first_group + tl.program_id(0), tl.arange(0, BLOCK_N)
    start, stop = tl.load(offsets_ptr + group), tl.load(offsets_ptr + group + 1)
    mask = cols < stop - start
    matrix_ptr += tl.program_id(0).to(tl.int64) * side * side
    no_key = tl.full([], -0x7FFFFFFFFFFFFFFF, tl.int64)
    score = tl.load(relevance_ptr + (start + cols) * stride_r, mask=mask, other=0.0).to(tl.float32)
    max_sim = tl.where(mask, 0.0, float("inf"))
    n_rows = (stop - start).to(tl.int32)
    budget = tl.load(budget_ptr + group).to(tl.int32)
    done = tl.full([], 0, tl.int32)
    while done < budget:
        share = (GROWTH * done.to(tl.float64)).to(tl.int32)
        count = tl.minimum(tl.minimum(budget - done, CHUNK), tl.maximum(1, share))
        key = tl.where(max_sim < float("inf"), rank_key(gain(score, max_sim, duplication, LOG), cols), no_key)
        candidates = mask
        if POOL > 1:  # noqa: SIM102 - a compile-time condition, the inner one is not
            if count > 1:
                candidates = _largest(key, tl.minimum(POOL * count, n_rows - done))
        for step in range(count):
            # With POOL 1, the best rows by this round's values are selected, regardless of their mutual similarity.
            if POOL > 1:  # noqa: SIM102
                if step > 0:
                    key = rank_key(gain(score, max_sim, duplication, LOG), cols)
            pivot = key_row(tl.max(tl.where(candidates & (max_sim < float("inf")), key, no_key), 0))
            tl.store(order_ptr + group * max_budget + done + step, start + pivot)
            similarity = tl.load(matrix_ptr + pivot * side + cols, mask=cols < side, other=0.0)
            max_sim = tl.where((cols == pivot) | ~mask, float("inf"), tl.maximum(max_sim, similarity))
        done += count


def progressive_mmr(
    relevance: Tensor,
    keys: Tensor,
    values: Tensor,
    offsets: Tensor,
    budgets: Tensor,
    duplication: float = 0.5,
    chunk: int = 16,
    growth: float = 0.25,
    pool: int = 4,
    objective: str = "linear",
    scaling: float | None = None,
    max_budget: int | None = None,
    max_length: int | None = None,
) -> Tensor:
    """See `vtprune_kernels.progressive_mmr`."""
    device, groups = keys.device, len(budgets)
    offsets, limit, max_budget, max_length = plan(offsets, budgets, len(keys), device, max_budget, max_length)
    if max_budget == 0 or max_length == 0:
        return torch.full((groups, max_budget), -1, dtype=torch.int64, device=device)
    log, updates = objective == "log", Updates(keys, values, scaling)
    together = groups_at_once(max_length, groups)
    if not together:
        rounds = Rounds(updates, relevance, offsets, limit, max_budget, max_length, duplication, log)
        return rounds.choose(chunk, growth, pool)
    side = side_of(max_length)
    order = torch.full((groups, max_budget), -1, dtype=torch.int64, device=device)
    matrix = torch.empty(together, side, side, device=device, dtype=torch.float32)
    for first in range(0, groups, together):
        count = min(together, groups - first)
        updates.matrix(offsets, first, matrix[:count])
        _choose[(count,)](
            matrix, relevance, relevance.stride(0), offsets, limit, order, max_budget, first, side, duplication,
            CHUNK=chunk, GROWTH=growth, POOL=pool, LOG=log, BLOCK_N=power_of_two(side), num_warps=8,
        )  # fmt: skip
    return order
