# SPDX-License-Identifier: Apache-2.0
"""Progressive chunked maximal marginal relevance as matrix products, with lazy evaluation of the candidates."""

from __future__ import annotations

import torch
from torch import Tensor

from .._lazy import lazy_top
from .._ragged import select_by_group
from .._small import is_small
from . import gram
from .duplication import Duplication
from .naive import gains


class _Group:
    """State of one group: the largest similarity of each row to the selected ones, updated only when needed."""

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
        """Selects `count` of the candidates, given in ascending order, exactly and greedily."""
        if count == 1:
            return candidates[self.bounds[candidates].argmax()][None]
        # A value is the smallest of those given a single selected row each, as in `gram.choose`.
        value = self.bounds[candidates]
        given_row = gains(
            self.relevance[candidates], self.similarity(candidates, candidates), self.duplication, self.objective
        )
        given_row.fill_diagonal_(-torch.inf)
        picked: list[int] = []
        for _ in range(count):
            picked.append(int(value.argmax()))
            torch.minimum(value, given_row[picked[-1]], out=value)
        return candidates[picked]

    def take(self, rows: Tensor) -> None:
        self.chosen = torch.cat([self.chosen, rows])
        self.bounds[rows] = -torch.inf


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
) -> Tensor:
    """See `vtprune_kernels.progressive_mmr`."""
    rules, width = (duplication, chunk, growth, pool, objective), keys.shape[1] * (keys.shape[2] + values.shape[2])

    def of_group(start: int, stop: int, budget: int) -> Tensor:
        path = gram.choose if is_small(stop - start, width, budget) else choose
        similarity = Duplication(keys[start:stop], values[start:stop], scaling)
        return path(relevance[start:stop], similarity, budget, *rules)

    return select_by_group(offsets, budgets, relevance.device, max_budget, of_group)


def choose(
    relevance: Tensor,
    similarity: Duplication,
    budget: int,
    duplication: float,
    chunk: int,
    growth: float,
    pool: int,
    objective: str,
) -> Tensor:
    """Same as `gram.choose`, with lazy evaluation."""
    state = _Group(relevance, similarity, duplication, objective)
    while (done := len(state.chosen)) < budget:
        count = min(budget - done, chunk, max(1, int(growth * done)))
        wanted = 1 if count == 1 else min(pool * count, len(relevance) - done)
        candidates = lazy_top(state.bounds, state.seen, done, wanted, state.refresh)
        if pool == 1:
            best_first = torch.sort(state.bounds[candidates], descending=True, stable=True).indices
            state.take(candidates[best_first])
        else:
            state.take(state.pick(candidates, count))
    return state.chosen
