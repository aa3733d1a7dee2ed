# SPDX-License-Identifier: Apache-2.0
"""Greedy MAP of a conditional determinantal point process: the specification, with the full kernel matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from .._ragged import empty_order, finite, groups, self_cosine, unit_rows

EXHAUSTED = 1e-6  # share of a row's own variance below which the selected rows explain it, up to rounding


def dpp_map(
    features: Tensor, relevance: Tensor, offsets: Tensor, budgets: Tensor, max_budget: int | None = None
) -> Tensor:
    """See `vtprune_kernels.dpp_map`."""
    order = empty_order(budgets, features.device, max_budget)
    for number, (start, stop, budget) in enumerate(groups(offsets, budgets)):
        unit, rel = unit_rows(features[start:stop]), torch.nan_to_num(relevance[start:stop].float(), 0, 0, 0)
        kernel = rel[:, None] * (unit @ unit.T) * rel  # [n, n]
        variance = finite(self_cosine(features[start:stop].float().norm(dim=1)) * rel.square())
        left = variance.clone()
        free = torch.ones(stop - start, dtype=torch.bool, device=features.device)
        factors = torch.zeros(budget, stop - start, device=features.device, dtype=torch.float32)
        chosen: list[int] = []
        while len(chosen) < budget:
            gain = torch.where(left > EXHAUSTED * variance, left, 0).masked_fill(~free, -torch.inf)
            best = int(gain.argmax())
            # As many rows as there are dimensions explain all others; what seems left of them is rounding.
            if gain[best] <= 0 or len(chosen) == features.shape[1]:
                rest = torch.sort(variance.masked_fill(~free, -torch.inf), descending=True, stable=True).indices
                chosen += rest[: budget - len(chosen)].tolist()
                break
            step = len(chosen)
            factors[step] = (kernel[best] - factors[:step, best] @ factors[:step]) / left[best].sqrt()
            left = left - factors[step].square()
            free[best] = False
            chosen.append(best)
        order[number, :budget] = torch.tensor(chosen, dtype=torch.int64) + start
    return order
