# SPDX-License-Identifier: Apache-2.0
"""Greedy MAP of a conditional DPP in a small group, from the matrix of the whole kernel."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._cosine import Cosine
from .._ragged import finite
from .naive import EXHAUSTED


def choose(kernel: Cosine, budget: int, rank: int, sure: Tensor | None = None) -> Tensor:
    """Selects rows of one group, returned as `[budget]` int64 in order of selection.

    Args:
        kernel: Kernel of the group's rows, including their relevance.
        budget: Number of rows to select, at least 1.
        rank: Dimensions of the rows: so many explain all others.
        sure: `[n]` variance that a row must have left to be selected. If the best row has less, the result ends before
            it, and is shorter than `budget`. By default rows that the selected ones explain come last.
    """
    variance, products = finite(kernel.squares), kernel(slice(None))  # [n], [n, n]
    left, least = variance.clone(), (EXHAUSTED if sure is None else 0.0) * variance
    factors = left.new_zeros(budget, len(left))
    transposed = factors.T
    chosen: list[int] = []
    for step in range(budget):
        gain, row = torch.where(left > least, left, 0).max(0)
        best, gained = int(row), float(gain)
        if sure is not None and (gained <= float(sure[best]) or step == rank):
            break
        if gained <= 0 or step == rank:
            rest = variance.index_fill(0, torch.tensor(chosen, dtype=torch.int64, device=left.device), -torch.inf)
            best_first = torch.sort(rest, descending=True, stable=True).indices
            chosen += best_first[: budget - step].tolist()
            break
        factor = torch.addmv(products[best], transposed, factors[:, best], alpha=-1) / math.sqrt(gained)
        factors[step] = factor
        left.addcmul_(factor, factor, value=-1)
        least[best] = torch.inf  # a selected row is not selected again
        chosen.append(best)
    return torch.tensor(chosen, dtype=torch.int64, device=left.device)
