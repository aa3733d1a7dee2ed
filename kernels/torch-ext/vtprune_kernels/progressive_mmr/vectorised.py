# SPDX-License-Identifier: Apache-2.0
"""Progressive chunked maximal marginal relevance in matrix products, with lazy evaluation of the candidates."""

from __future__ import annotations

import torch
from torch import Tensor

from .._lazy import lazy_top
from .._ragged import empty_order, pools, unit_rows
from .naive import gains


class Duplication:
    """Similarities between rows of one pool, as matrix products over blocks of rows.

    Args:
        keys: `[n, G, dk]`, any float dtype.
        values: `[n, G, dv]`.
        scaling: Factor of the attention's dot product, `dk ** -0.5` by default.
    """

    def __init__(self, keys: Tensor, values: Tensor, scaling: float | None = None) -> None:
        keys = keys.float()
        # Distances do not change under a shift; without the shared part of the keys (their bias) less is cancelled.
        self.keys = keys - keys.mean(0)
        self.scale = keys.shape[-1] ** -0.5 if scaling is None else scaling
        self.half = self.keys.square().sum(-1) * (self.scale / 2)  # [n, G]
        self.values = unit_rows(values)

    def __call__(self, rows: Tensor, columns: Tensor) -> Tensor:
        """`[R, C]` similarity of `rows` `[R]` with `columns` `[C]`, averaged over the KV heads."""
        key_rows, key_columns = (
            self.keys[rows].transpose(0, 1),
            self.keys[columns].permute(1, 2, 0),
        )  # [G,R,dk] [G,dk,C]
        exponent = torch.baddbmm(self.half[columns].T[:, None], key_rows, key_columns, beta=-1, alpha=self.scale)
        exponent = (exponent - self.half[rows].T[..., None]).clamp_max_(0)  # [G, R, C]
        cosine = self.values[rows].transpose(0, 1) @ self.values[columns].permute(1, 2, 0)  # [G, R, C]
        return exponent.exp_().mul_(cosine).mean(0)


class _Pool:
    """State of one pool: the largest similarity of each row with the chosen ones, kept up only as far as needed."""

    def __init__(self, relevance: Tensor, similarity: Duplication, duplication: float, objective: str) -> None:
        self.relevance, self.duplication, self.objective = relevance.float(), duplication, objective
        self.similarity = similarity
        self.closest = torch.zeros_like(self.relevance)
        self.bounds = self.gains(torch.arange(len(relevance), device=relevance.device), self.closest)
        self.seen = torch.zeros(len(relevance), dtype=torch.int64, device=relevance.device)
        self.chosen = self.seen[:0]

    def gains(self, rows: Tensor, closest: Tensor) -> Tensor:
        return gains(self.relevance[rows], closest, self.duplication, self.objective)

    def refresh(self, rows: Tensor) -> None:
        unseen = self.chosen[int(self.seen[rows].min()) :]
        self.closest[rows] = torch.maximum(self.closest[rows], self.similarity(rows, unseen).amax(1))
        self.bounds[rows] = torch.minimum(self.bounds[rows], self.gains(rows, self.closest[rows]))
        self.seen[rows] = len(self.chosen)

    def pick(self, candidates: Tensor, count: int) -> Tensor:
        """Exact greedy choice of `count` of the candidates, given in ascending order."""
        if count == 1:
            return candidates[self.bounds[candidates].argmax()][None]
        among = self.similarity(candidates, candidates)
        relevance, closest = self.relevance[candidates], self.closest[candidates]
        taken = torch.zeros_like(closest)
        picked = []
        for _ in range(count):
            value = gains(relevance, closest, self.duplication, self.objective) + taken
            picked.append(value.argmax())
            taken[picked[-1]] = -torch.inf
            closest = torch.maximum(closest, among[picked[-1]])
        return candidates[torch.stack(picked)]

    def take(self, rows: Tensor) -> None:
        self.chosen = torch.cat([self.chosen, rows])
        self.bounds[rows] = -torch.inf


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
    order = empty_order(budgets, relevance.device, width)
    for number, (start, stop, budget) in enumerate(pools(segments, budgets)):
        if budget == 0:
            continue
        similarity = Duplication(keys[start:stop], values[start:stop], scaling)
        state = _Pool(relevance[start:stop], similarity, duplication, objective)
        if carried is not None:
            state.take(carried[start:stop].nonzero().flatten())
        before = len(state.chosen)
        budget = min(budget, stop - start - before)
        while (done := len(state.chosen) - before) < budget:
            count = min(budget - done, chunk, max(1, int(growth * done)))
            wanted = 1 if count == 1 else min(pool * count, stop - start - before - done)
            candidates = lazy_top(state.bounds, state.seen, before + done, wanted, state.refresh)
            if pool == 1:
                best_first = torch.sort(state.bounds[candidates], descending=True, stable=True).indices
                state.take(candidates[best_first])
            else:
                state.take(state.pick(candidates, count))
        order[number, :budget] = state.chosen[before:] + start
    return order
