# SPDX-License-Identifier: Apache-2.0
"""Maximal marginal relevance over the ragged batch: whole groups at once, or part by part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from vtprune_kernels import progressive_mmr
from vtprune_kernels.progressive_mmr import closest_other

from ...core.ragged import from_order


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
        self, rows: Candidates, budgets: Tensor, max_budget: int | None = None, max_length: int | None = None
    ) -> Tensor:
        """Rows `[S, max_budget]` in the order of selection, padded with -1.

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
            None,
            max_budget,
            max_length,
        )

    def keep(self, rows: Candidates, budgets: Tensor, max_budget: int | None, max_length: int | None) -> Tensor:
        """Keep mask `[M]`; arguments as for `order`."""
        return from_order(self.order(rows, budgets, max_budget, max_length), len(rows.relevance))
