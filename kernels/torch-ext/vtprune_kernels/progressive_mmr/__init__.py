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
    preselected: Tensor | None = None,
    max_budget: int | None = None,
    max_length: int | None = None,
) -> Tensor:
    """Chooses rows by relevance minus duplication with the rows already chosen.

    The duplication of two rows is the cosine of their rank-one weight updates `phi(k)^T v`, averaged over the KV heads:
    `S_ij = mean_g cos(v_gi, v_gj) * exp(-scaling |k_gi - k_gj|^2 / 2)`. The similarity matrix is never formed: the
    state is a few numbers per row.

    Each round chooses `c = max(1, floor(growth * chosen))` rows, at most `chunk`: exactly and greedily among the
    `pool * c` best of the last round's values. `chunk=1` is the exact greedy choice.

    Args:
        relevance: `[M]` float, higher is better; for `objective="log"` the logarithm of the magnitudes.
        keys: `[M, G, dk]` keys per KV head.
        values: `[M, G, dv]` values per KV head.
        offsets: `[S + 1]` int64 offsets of the groups in the rows.
        budgets: `[S]` int64 rows to choose from each group.
        duplication: Weight of the largest similarity with a chosen row, in `[0, 1]`.
        chunk: Most rows chosen between two updates.
        growth: Rows chosen in a round as a share of those already chosen.
        pool: Candidates per row to choose; 1 takes the best `c` at once, without looking at each other.
        objective: `"linear"`: `r - duplication * max(0, S_max)`;
            `"log"`: `log M + 0.5 log(1 - duplication * max(0, S_max)^2 + 1e-6)`.
        scaling: Factor of the attention's dot product, `dk ** -0.5` by default.
        preselected: `[M]` bool, rows chosen before, which are not returned and not part of the budgets.
        max_budget: Columns of the result, `max(budgets)` or more; by default it is read from `budgets`, which waits for
            their device.
        max_length: Rows of the longest group, or more; by default it is read from `offsets` in the same way. Only a GPU
            needs it.

    Returns:
        Tensor: `[S, max_budget]` int64 row numbers in the order of choice, padded with -1. Ties: the smaller row.
    """
    if objective not in ("linear", "log"):
        raise ValueError(f"objective is {objective!r}; expected 'linear' or 'log'")
    if chunk < 1 or pool < 1 or growth < 0:
        raise ValueError(f"chunk={chunk}, pool={pool}, growth={growth}; expected chunk and pool >= 1, growth >= 0")
    settings = (duplication, chunk, growth, pool, objective, scaling, preselected, max_budget)
    if on_gpu(keys):
        return triton_source("progressive_mmr")(relevance, keys, values, offsets, budgets, *settings, max_length)
    return _vectorized(relevance, keys, values, offsets, budgets, *settings)


def closest_other(keys: Tensor, values: Tensor, offsets: Tensor, scaling: float | None = None) -> Tensor:
    """Largest similarity of each row with another row of its group, in blocks; a diagnostic that costs `O(N^2)` time.

    Args:
        keys: `[M, G, dk]`.
        values: `[M, G, dv]`.
        offsets: `[S + 1]` int64 offsets of the groups.
        scaling: Factor of the attention's dot product, `dk ** -0.5` by default.

    Returns:
        Tensor: `[M]` float32, minus infinity in groups of one row.
    """
    closest = torch.full((len(keys),), -torch.inf, device=keys.device)
    for start, stop in spans(offsets):
        similarity = Duplication(keys[start:stop], values[start:stop], scaling)
        everything = torch.arange(stop - start, device=keys.device)
        for rows in everything.split(256):
            block = similarity(rows, everything)  # [256, n]
            block[rows - rows[0], rows] = -torch.inf
            closest[rows + start] = block.amax(1)
    return closest


__all__ = ["Duplication", "closest_other", "progressive_mmr"]
