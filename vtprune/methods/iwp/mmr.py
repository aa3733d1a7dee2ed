# SPDX-License-Identifier: Apache-2.0
"""Maximal marginal relevance over the ragged batch: whole groups at once, or part by part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vtprune_kernels import progressive_mmr
from vtprune_kernels.progressive_mmr import closest_other

from ...core.ragged import from_order, group_ids


@dataclass
class Candidates:
    """Rows to choose from, with their relevance, keys and values.

    Attributes:
        relevance: `[M]` float, higher is better; logarithms for the objective `"log"`.
        keys, values: `[M, G, dk]`, `[M, G, dv]`; the similarity of two rows is the cosine of their rank-one updates.
        scaling: Factor on the dot product of the attention.
        offsets: `[S + 1]` offsets of the groups.
    """

    relevance: Tensor
    keys: Tensor
    values: Tensor
    scaling: float
    offsets: Tensor

    def closest(self) -> Tensor:
        """`[M]` largest similarity of each row with another one of its group; costs `O(M^2)` time."""
        return closest_other(self.keys, self.values, self.offsets, self.scaling)


@dataclass
class MMR:
    """Chooses rows by relevance minus similarity to those chosen before; see `vtprune_kernels.progressive_mmr`."""

    duplication: float = 0.5
    chunk: int = 16
    growth: float = 0.25
    pool: int = 4
    objective: Literal["linear", "log"] = "linear"

    def order(
        self,
        rows: Candidates,
        budgets: Tensor,
        preselected: Tensor | None = None,
        max_budget: int | None = None,
        max_length: int | None = None,
    ) -> Tensor:
        """`[S, max_budget]` rows in the order of choice, padded with -1; those `preselected` `[M]` count as chosen.

        Without `max_budget` and `max_length` (rows of the longest group), they are read from `budgets` and the offsets,
        which waits for the device that these are on.
        """
        return progressive_mmr(
            rows.relevance,
            rows.keys,
            rows.values,
            rows.offsets,
            budgets,
            self.duplication,
            self.chunk,
            self.growth,
            self.pool,
            self.objective,
            rows.scaling,
            preselected,
            max_budget,
            max_length,
        )

    def whole(
        self, rows: Candidates, budgets: Tensor, max_budget: int | None = None, max_length: int | None = None
    ) -> Tensor:
        """Keep mask `[M]`, each group at once; `max_budget` and `max_length` as for `order`."""
        return from_order(self.order(rows, budgets, max_budget=max_budget, max_length=max_length), len(rows.relevance))

    def stream(self, rows: Candidates, budgets: Tensor, block: int) -> Tensor:
        """Keep mask `[M]`: block after block of each group, each with its share of the budget."""
        group, place, length, budgets = _places(rows.offsets, budgets)
        kept = torch.zeros_like(group, dtype=torch.bool)
        given = torch.zeros_like(budgets)
        for start in range(0, int(length.max()), block):
            inside = (place >= start) & (place < start + block)
            due = budgets * length.clamp_max(start + block) // length.clamp_min(1)  # [S] until the end of this block
            kept = self._pick(rows, inside, group, due - given, kept)
            given = due
        return kept

    def tournament(self, rows: Candidates, budgets: Tensor, block: int) -> Tensor:
        """Keep mask `[M]`: twice the share of each block first, then the budget among these."""
        group, place, length, budgets = _places(rows.offsets, budgets)
        nothing = torch.zeros_like(group, dtype=torch.bool)
        part, size, of = _runs(group, place // block)
        quota = -(-2 * budgets[of] * size // length[of])
        winners = self._pick(rows, ~nothing, part, torch.minimum(quota, size), nothing)
        return self._pick(rows, winners, group, budgets, nothing)

    def floored(self, rows: Candidates, budgets: Tensor, labels: Tensor, floor: float) -> Tensor:
        """Keep mask `[M]`: every run of equal `labels` `[M]` first gets `floor` times its fair part of the budget."""
        group, _, length, budgets = _places(rows.offsets, budgets)
        nothing = torch.zeros_like(group, dtype=torch.bool)
        part, size, of = _runs(group, labels)
        sure = (floor * (budgets[of] * size / length[of])).floor().long()
        kept = self._pick(rows, ~nothing, part, sure, nothing)
        return self._pick(rows, ~nothing, group, budgets - torch.zeros_like(budgets).scatter_add(0, of, sure), kept)

    def _pick(self, rows: Candidates, among: Tensor, group: Tensor, budgets: Tensor, kept: Tensor) -> Tensor:
        """`kept` and `budgets[g]` more rows of each `group` `[M]`, chosen `among` `[M]` against those kept."""
        subset = (among | kept).nonzero().squeeze(1)  # [m]
        counts = torch.bincount(group[subset], minlength=len(budgets))
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        part = Candidates(rows.relevance[subset], rows.keys[subset], rows.values[subset], rows.scaling, offsets)
        order = self.order(part, budgets, kept[subset])
        return kept | from_order(torch.where(order >= 0, subset[order], -1), len(kept))


def _places(offsets: Tensor, budgets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Group of every row and its index in the group, length of every group, and the budgets on the same device."""
    group = group_ids(offsets)
    place = torch.arange(len(group), device=group.device) - offsets[:-1][group]
    return group, place, offsets.diff(), budgets.to(offsets.device)


def _runs(group: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Runs of equal group and label: `[M]` the run of each row, `[P]` their sizes, `[P]` their groups."""
    changed = (group.diff() != 0) | (labels.diff() != 0)
    run = torch.cat([changed.new_zeros(1), changed]).cumsum(0)
    size = torch.bincount(run)
    return run, size, torch.zeros_like(size).scatter(0, run, group)
