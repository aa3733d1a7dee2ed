# SPDX-License-Identifier: Apache-2.0
"""Progressive chunked maximal marginal relevance over rank-one updates (IWP, arXiv 2604.00757, App. A)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .._dispatch import on_gpu, triton_source
from .._ragged import spans
from .duplication import Duplication
from .vectorized import progressive_mmr as _vectorized


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
    objective: Literal["linear", "log"] = "linear",
    scaling: float | None = None,
    max_budget: int | None = None,
    max_length: int | None = None,
) -> Tensor:
    """Selects rows by relevance minus duplication of the rows already selected.

    The duplication of two rows is the cosine of their rank-one weight updates `phi(k)^T v`, averaged over the KV heads:
    `S_ij = mean_g cos(v_gi, v_gj) * exp(-scaling |k_gi - k_gj|^2 / 2)`. Its matrix is only formed for groups where that
    is faster.

    Each round selects `c = max(1, floor(growth * selected))` rows, at most `chunk`: exactly and greedily among the
    `pool * c` best by the last round's values. `chunk=1` is the exact greedy selection.

    Args:
        relevance: `[M]` float, higher is better; for `objective="log"` the logarithm of the magnitudes.
        keys: `[M, G, dk]` keys per KV head.
        values: `[M, G, dv]` values per KV head.
        offsets: `[S + 1]` int64 offsets of the groups in the rows.
        budgets: `[S]` int64 number of rows to select from each group.
        duplication: Weight of the largest similarity to a selected row, in `[0, 1]`.
        chunk: Largest number of rows selected in a round.
        growth: Rows selected in a round as a share of those already selected.
        pool: Number of candidates per row to select; 1 takes the best `c`, regardless of their mutual similarity.
        objective: `"linear"`: `r - duplication * max(0, S_max)`;
            `"log"`: `log M + 0.5 log(1 - duplication * max(0, S_max)^2 + 1e-6)`.
        scaling: Factor of the attention's dot product, `dk ** -0.5` by default.
        max_budget: Width of the result, at least `max(budgets)`; by default it is read from `budgets`, which
            synchronizes with their device.
        max_length: Length of the longest group, or more; by default it is read from `offsets` in the same way. Only
            used on a GPU.

    Returns:
        Tensor: `[S, max_budget]` int64 row numbers in order of selection, padded with -1. Ties go to the smaller row.
    """
    if objective not in ("linear", "log"):
        raise ValueError(f"objective is {objective!r}; expected 'linear' or 'log'")
    if chunk < 1 or pool < 1 or growth < 0:
        raise ValueError(f"chunk={chunk}, pool={pool}, growth={growth}; expected chunk and pool >= 1, growth >= 0")
    settings = (duplication, chunk, growth, pool, objective, scaling, max_budget)
    if on_gpu(keys):
        return triton_source("progressive_mmr")(relevance, keys, values, offsets, budgets, *settings, max_length)
    return _vectorized(relevance, keys, values, offsets, budgets, *settings)


def closest_other(keys: Tensor, values: Tensor, offsets: Tensor, scaling: float | None = None) -> Tensor:
    """Largest similarity of each row to another row of its group; a diagnostic that takes `O(N^2)` time.

    Args:
        keys: `[M, G, dk]`.
        values: `[M, G, dv]`.
        offsets: `[S + 1]` int64 offsets of the groups.
        scaling: Factor of the attention's dot product, `dk ** -0.5` by default.

    Returns:
        Tensor: `[M]` float32, minus infinity in groups of one row.
    """
    closest = torch.full((len(keys),), -torch.inf, device=keys.device, dtype=torch.float32)
    for start, stop in spans(offsets):
        similarity = Duplication(keys[start:stop], values[start:stop], scaling)
        everything = torch.arange(stop - start, device=keys.device)
        for rows in everything.split(256):
            block = similarity(rows, everything)  # [256, n]
            block[rows - rows[0], rows] = -torch.inf
            closest[rows + start] = block.amax(1)
    return closest


__all__ = ["Duplication", "closest_other", "progressive_mmr"]
