# SPDX-License-Identifier: Apache-2.0
"""Progressive chunked maximal marginal relevance: the specification, in readable loops."""

from __future__ import annotations

import torch
from torch import Tensor

from .._ragged import empty_order, finite, groups, unit_rows


def similarity(keys: Tensor, values: Tensor, one: int, scaling: float | None = None) -> Tensor:
    """Similarity `[n]` of every row to row `one`: `mean_g cos(v_i, v_j) exp(-scaling |k_i - k_j|^2 / 2)`."""
    scaling = keys.shape[-1] ** -0.5 if scaling is None else scaling
    keys, unit = keys.float(), unit_rows(values)
    distance = (keys - keys[one]).square().sum(-1)  # [n, G]
    cosine = (unit * unit[one]).sum(-1)  # [n, G]
    return (cosine * torch.exp(-0.5 * scaling * distance)).mean(-1)


def gains(relevance: Tensor, closest: Tensor | None, duplication: float, objective: str) -> Tensor:
    """Value `[n]` of each row, given its largest similarity to the rows selected so far; None before the first."""
    if closest is None:
        if objective == "linear":
            return finite(relevance).clone()
        closest = relevance.new_zeros(1)
    if objective == "log":
        return finite(relevance + 0.5 * torch.log(1 - duplication * closest.clamp_min(0).square() + 1e-6))
    return finite(relevance - duplication * closest.clamp_min(0))


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
    order = empty_order(budgets, relevance.device, max_budget)
    for number, (start, stop, budget) in enumerate(groups(offsets, budgets)):
        score, k, v = relevance[start:stop].float(), keys[start:stop], values[start:stop]
        free = torch.ones(stop - start, dtype=torch.bool, device=relevance.device)
        closest = torch.zeros(stop - start, device=relevance.device, dtype=torch.float32)
        chosen: list[int] = []
        while len(chosen) < budget:
            count = min(budget - len(chosen), chunk, max(1, int(growth * len(chosen))))
            value = gains(score, closest, duplication, objective).masked_fill(~free, -torch.inf)
            best_first = torch.sort(value, descending=True, stable=True).indices.tolist()
            candidates = best_first[: min(pool * count, int(free.sum()))]
            if pool == 1:
                picked = candidates
            else:
                picked, inner = [], closest
                for _ in range(count):
                    value = gains(score, inner, duplication, objective)
                    rest = sorted(set(candidates) - set(picked))
                    picked.append(max(rest, key=lambda row: (float(value[row]), -row)))
                    inner = torch.maximum(inner, similarity(k, v, picked[-1], scaling))
            for row in picked:
                closest = torch.maximum(closest, similarity(k, v, row, scaling))
                free[row] = False
            chosen += picked
        order[number, :budget] = torch.tensor(chosen, dtype=torch.int64) + start
    return order
