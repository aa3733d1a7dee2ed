# SPDX-License-Identifier: Apache-2.0
"""Progressive chunked maximal marginal relevance of a small group, on one matrix of all similarities."""

from __future__ import annotations

import torch
from torch import Tensor

from .duplication import Duplication
from .naive import gains


def choose(
    relevance: Tensor,
    similarity: Duplication,
    budget: int,
    duplication: float,
    chunk: int,
    growth: float,
    pool: int,
    objective: str,
    preselected: Tensor | None,
) -> Tensor:
    """Rows of one group in the order of choice, `[budget]` int64.

    A row's value falls with its largest similarity to a chosen row. So it is the least of its values beside each of
    them alone, and one matrix `[n, n]` of these values is all that the picks need.

    Args:
        relevance: `[n]`.
        similarity: Of the group's rows.
        budget: Rows to choose, at most those that are not preselected.
        duplication, chunk, growth, pool, objective: As for `progressive_mmr`.
        preselected: `[n]` bool, rows chosen before, or None.
    """
    relevance = relevance.float()
    value = gains(relevance, torch.zeros_like(relevance), duplication, objective)
    beside = gains(relevance, similarity.all_pairs(), duplication, objective)  # [n, n]
    beside.fill_diagonal_(-torch.inf)  # a chosen row is out of the race
    if preselected is not None:
        value = torch.minimum(value, beside[preselected].amin(0)) if bool(preselected.any()) else value
    chosen: list[int] = []
    while len(chosen) < budget:
        count = min(budget - len(chosen), chunk, max(1, int(growth * len(chosen))))
        if pool == 1:
            picked = torch.sort(value, descending=True, stable=True).indices[:count]
            value = torch.minimum(value, beside[picked].amin(0))
            chosen += picked.tolist()
            continue
        outside = None  # minus infinity for rows that are no candidates of this round
        if count > 1:
            candidates = torch.sort(value, descending=True, stable=True).indices[: pool * count]
            outside = torch.full_like(value, -torch.inf).index_fill_(0, candidates, 0)
        for _ in range(count):
            best = int((value if outside is None else value + outside).argmax())
            value = torch.minimum(value, beside[best])
            chosen.append(best)
    return torch.tensor(chosen, dtype=torch.int64, device=relevance.device)
