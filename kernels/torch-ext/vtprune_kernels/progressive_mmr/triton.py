# SPDX-License-Identifier: Apache-2.0
"""Progressive chunked maximal marginal relevance on a GPU.

If the similarities of all pairs of a group fit into the allowed memory, they are computed first, and one program per
group runs all rounds; longer groups are handled by `triton_rounds`. A selected row gets infinite similarity.
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
def _largest(key, wanted):
    """Marks the `wanted` largest of distinct int64 keys of `rank_key`."""
    high = (key >> 32).to(tl.int32)
    least, most = tl.min(high, 0), tl.max(high, 0)
    found = tl.full([], 0x7FFFFFFF, tl.int32)
    # Bisection for the largest value that at least `wanted` keys reach.
    while (least < most) & (found != wanted):
        middle = (least.to(tl.int64) + (most.to(tl.int64) - least.to(tl.int64) + 1) // 2).to(tl.int32)
        count = tl.sum((high >= middle).to(tl.int32), 0)
        enough = count >= wanted
        least = tl.where(enough, middle, least)
        found = tl.where(enough, count, found)
        most = tl.where(enough, most, middle - 1)
    result = high >= least
    over = tl.sum(result.to(tl.int32), 0) - wanted
    if over > 0:  # of equal values, the last rows are removed
        equal = high == least
        result = result & (~equal | (tl.cumsum(equal.to(tl.int32), 0) <= tl.sum(equal.to(tl.int32), 0) - over))
    return result


@triton.jit(do_not_specialize=["max_budget", "first"])
def _choose(
    matrix, relevance, relevance_stride, near, offsets, limit, order, max_budget, first, side, duplication,
    CHUNK: tl.constexpr, GROWTH: tl.constexpr, POOL: tl.constexpr, LOG: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Runs all rounds of one group."""
    group, place = first + tl.program_id(0), tl.arange(0, BLOCK)
    start, stop = tl.load(offsets + group), tl.load(offsets + group + 1)
    inside = place < stop - start
    matrix += tl.program_id(0).to(tl.int64) * side * side
    nothing = tl.full([], -0x7FFFFFFFFFFFFFFF, tl.int64)
    score = tl.load(relevance + (start + place) * relevance_stride, mask=inside, other=0.0).to(tl.float32)
    closest = tl.load(near + start + place, mask=inside, other=float("inf"))
    free = tl.sum((closest < float("inf")).to(tl.int32), 0)
    budget = tl.load(limit + group).to(tl.int32)
    done = tl.full([], 0, tl.int32)
    while done < budget:
        share = (GROWTH * done.to(tl.float64)).to(tl.int32)
        count = tl.minimum(tl.minimum(budget - done, CHUNK), tl.maximum(1, share))
        key = tl.where(closest < float("inf"), rank_key(gain(score, closest, duplication, LOG), place), nothing)
        among = inside
        if POOL > 1:  # noqa: SIM102 - a compile-time condition, the inner one is not
            if count > 1:
                among = _largest(key, tl.minimum(POOL * count, free - done))
        for step in range(count):
            # With POOL 1, the best by this round's values are taken, regardless of their mutual similarity.
            if POOL > 1:  # noqa: SIM102
                if step > 0:
                    key = rank_key(gain(score, closest, duplication, LOG), place)
            one = key_row(tl.max(tl.where(among & (closest < float("inf")), key, nothing), 0))
            tl.store(order + group * max_budget + done + step, start + one)
            similar = tl.load(matrix + one * side + place, mask=place < side, other=0.0)
            closest = tl.where((place == one) | ~inside, float("inf"), tl.maximum(closest, similar))
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
    preselected: Tensor | None = None,
    max_budget: int | None = None,
    max_length: int | None = None,
) -> Tensor:
    """See `vtprune_kernels.progressive_mmr`."""
    device, groups = keys.device, len(budgets)
    offsets, limit, max_budget, max_length = plan(offsets, budgets, len(keys), device, max_budget, max_length)
    if max_budget == 0 or max_length == 0:
        return torch.full((groups, max_budget), -1, dtype=torch.int64, device=device)
    if preselected is not None:
        preselected = preselected.to(torch.uint8)
        kept = torch.cat([preselected.new_zeros(1, dtype=torch.int64), preselected.cumsum(0)])[offsets].diff()
        limit = torch.minimum(limit, offsets.diff() - kept)
    log = objective == "log"
    updates = Updates(keys, values, scaling)
    rounds = Rounds(updates, relevance, offsets, limit, max_budget, max_length, duplication, log)
    if preselected is not None:
        rounds.add_preselected(preselected)
    together = groups_at_once(max_length, groups)
    if not together:
        return rounds.choose(chunk, growth, pool)
    side = side_of(max_length)
    matrix = torch.empty(together, side, side, device=device)
    for first in range(0, groups, together):
        count = min(together, groups - first)
        updates.matrix(offsets, first, matrix[:count])
        _choose[(count,)](
            matrix, relevance, relevance.stride(0), rounds.near, offsets, limit, rounds.order, max_budget, first, side,
            duplication, CHUNK=chunk, GROWTH=growth, POOL=pool, LOG=log, BLOCK=power_of_two(side), num_warps=8,
        )  # fmt: skip
    return rounds.order
