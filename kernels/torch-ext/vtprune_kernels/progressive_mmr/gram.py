# SPDX-License-Identifier: Apache-2.0
"""Progressive chunked maximal marginal relevance of a small group, from a matrix of all similarities."""

from __future__ import annotations

import torch
from torch import Tensor

from .._ragged import finite
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
) -> Tensor:
    """Selects rows of one group, returned as `[budget]` int64 in order of selection.

    A row's value falls with its largest similarity to a selected row. So it is the minimum of its values given each
    selected row alone, and the picks only need one matrix `[n, n]` of these values.

    Args:
        relevance: `[n]`.
        similarity: Similarities of the group's rows.
        budget: Number of rows to select.
        duplication, chunk, growth, pool, objective: As for `progressive_mmr`.
    """
    relevance = relevance.float()
    value = gains(relevance, None, duplication, objective)
    given_row = similarity.all_pairs()  # [n, n]
    if objective == "linear":  # as `gains`, in place
        given_row = finite(given_row.clamp_min_(0).mul_(-duplication).add_(relevance))
    else:
        given_row = gains(relevance, given_row, duplication, objective)
    given_row.fill_diagonal_(-torch.inf)  # a selected row is not selected again
    chosen: list[int] = []
    while len(chosen) < budget:
        count = min(budget - len(chosen), chunk, max(1, int(growth * len(chosen))))
        if pool == 1:
            picked = torch.sort(value, descending=True, stable=True).indices[:count]
            value = torch.minimum(value, given_row[picked].amin(0))
            chosen += picked.tolist()
            continue
        candidates, numbers = None, None  # of this round, by ascending number
        if count > 1:
            candidates = torch.sort(value, descending=True, stable=True).indices[: pool * count].sort().values
            numbers = candidates.tolist()
        for _ in range(count):
            best = int((value if candidates is None else value.index_select(0, candidates)).argmax())
            best = best if numbers is None else numbers[best]
            torch.minimum(value, given_row[best], out=value)
            chosen.append(best)
    return torch.tensor(chosen, dtype=torch.int64, device=relevance.device)
