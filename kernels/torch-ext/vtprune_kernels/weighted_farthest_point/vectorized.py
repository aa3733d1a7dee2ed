# SPDX-License-Identifier: Apache-2.0
"""Farthest-point selection with lazy evaluation: distances never rise, so most rows are not evaluated again."""

from __future__ import annotations

import torch
from torch import Tensor

from .._cosine import Cosine
from .._lazy import Window, lazy_top
from .._ragged import finite, select_by_group
from .._small import is_small, is_small_for_isolation
from . import gram
from .isolated import most_isolated
from .naive import distances


def weighted_farthest_point(
    features: Tensor, weights: Tensor | None, offsets: Tensor, budgets: Tensor, max_budget: int | None = None
) -> Tensor:
    """See `vtprune_kernels.weighted_farthest_point`."""

    def of_group(start: int, stop: int, budget: int) -> Tensor:
        weight = None if weights is None else weights[start:stop].float()
        cosine = Cosine(features[start:stop])
        return (gram.choose if _is_small(cosine, weight, budget) else choose)(cosine, weight, budget)

    return select_by_group(offsets, budgets, features.device, max_budget, of_group)


def _is_small(cosine: Cosine, weight: Tensor | None, budget: int) -> bool:
    rows, width = cosine.rows.shape
    if weight is None:
        return is_small_for_isolation(rows, width)
    # With a negative weight, the value of a row is not the minimum of its weighted distances.
    return is_small(rows, width, budget) and not bool((weight < 0).any())


def choose(cosine: Cosine, weight: Tensor | None, budget: int) -> Tensor:
    """Same as `gram.choose`, with lazy evaluation and weights of any sign."""
    return _Group(cosine, weight, budget).choose()


class _Group:
    """State of one group: each row's distance to the nearest selected one, updated only when needed."""

    def __init__(self, cosine: Cosine, weight: Tensor | None, budget: int) -> None:
        self.cosine, self.weight = cosine, weight
        self.everything = torch.arange(len(cosine), device=cosine.rows.device)
        self.nearest = torch.full((len(cosine),), torch.inf, device=cosine.rows.device, dtype=torch.float32)
        self.bounds = self.nearest.clone()
        self.seen = torch.zeros_like(self.everything)
        self.chosen = self.everything.new_zeros(budget)
        self.done = 0
        # With a negative weight the weighted distance rises, so that an old value is no upper bound.
        self.falling = weight is None or not bool((weight < 0).any())

    def values(self, rows: Tensor, nearest: Tensor) -> Tensor:
        return nearest if self.weight is None else finite(self.weight[rows] * nearest)

    def update(self, rows: Tensor, nearest: Tensor) -> None:
        self.nearest[rows] = nearest
        selected = self.bounds[rows] == -torch.inf
        self.bounds[rows] = self.values(rows, nearest).masked_fill(selected, -torch.inf)
        self.seen[rows] = self.done

    def refresh(self, rows: Tensor) -> None:
        unseen = self.chosen[int(self.seen[rows].min()) : self.done]
        whole = self.cosine if rows is self.everything else self.cosine.subset(rows)
        self.update(rows, torch.minimum(self.nearest[rows], distances(self.cosine.between(unseen, whole).amax(0))))

    def take(self, rows: Tensor) -> None:
        self.chosen[self.done : self.done + len(rows)] = rows
        self.bounds[rows] = -torch.inf
        self.done += len(rows)

    def pick(self, rows: Tensor, limit: int) -> None:
        """Selects up to `limit` of `rows`, whose bounds are exact, as long as the best exceeds all bounds outside."""
        rest = float(self.bounds.index_fill(0, rows, -torch.inf).amax())
        among = self.cosine.subset(rows)
        distance = distances(among(slice(None)))  # [w, w]
        nearest, weight = self.nearest[rows], None if self.weight is None else self.weight[rows]
        taken = torch.zeros_like(nearest)
        picked: list[int] = []
        while len(picked) < limit:
            value = nearest if weight is None else finite(weight * nearest)
            value = value + taken
            best = int(value.argmax())
            if picked and not float(value[best]) > rest:
                break
            taken[best] = -torch.inf
            picked.append(best)
            nearest = torch.minimum(nearest, distance[best])
        self.take(rows[rows.new_tensor(picked)])
        self.update(rows, nearest)

    def choose(self) -> Tensor:
        """Selects rows `[budget]`, returned in order of selection."""
        budget, length = len(self.chosen), len(self.cosine)
        self.take(most_isolated(self.cosine) if self.weight is None else finite(self.weight).argmax()[None])
        window = Window()
        while self.done < budget:
            if self.done == 1 or not self.falling:
                self.refresh(self.everything)
            before = self.done
            width = min(window.rows, length - before) if self.falling else 1
            self.pick(lazy_top(self.bounds, self.seen, before, width, self.refresh), min(width, budget - before))
            window.adapt(self.done - before)
        return self.chosen
