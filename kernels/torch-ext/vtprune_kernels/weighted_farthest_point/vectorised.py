# SPDX-License-Identifier: Apache-2.0
"""Farthest-point choice without a distance matrix: distances only fall, so most rows need no new product."""

from __future__ import annotations

import torch
from torch import Tensor

from .._lazy import lazy_top
from .._ragged import empty_order, finite, pools, unit_rows

_PROBES = 64


def most_isolated(unit: Tensor) -> int:
    """Row whose nearest other row is farthest away.

    The distance to any other row bounds the distance to the nearest from above, so a few probed rows rule out most
    rows, and only the rest is compared with all others.
    """
    length = len(unit)
    nearest = torch.full((length,), torch.inf, device=unit.device)
    done = torch.zeros(length, dtype=torch.int64, device=unit.device)

    def probe(rows: Tensor) -> None:
        distance = 1 - unit[rows] @ unit.T  # [p, n]
        distance[torch.arange(len(rows), device=unit.device), rows] = torch.inf
        nearest.copy_(torch.minimum(nearest, distance.amin(0)))
        nearest[rows] = torch.minimum(nearest[rows], distance.amin(1))
        done[rows] = 1

    probe(torch.arange(0, length, max(1, length // _PROBES), device=unit.device))
    return int(lazy_top(nearest, done, 1, 1, probe))


def weighted_farthest_point(features: Tensor, weights: Tensor | None, segments: Tensor, budgets: Tensor) -> Tensor:
    """See `vtprune_kernels.weighted_farthest_point`."""
    order = empty_order(budgets, features.device)
    for number, (start, stop, budget) in enumerate(pools(segments, budgets)):
        if budget > 0:
            weight = None if weights is None else weights[start:stop].float()
            order[number, :budget] = _choose(unit_rows(features[start:stop]), weight, budget) + start
    return order


def _choose(unit: Tensor, weight: Tensor | None, budget: int) -> Tensor:
    """`[budget]` rows of one pool in the order of choice."""
    length = len(unit)
    chosen = torch.empty(budget, dtype=torch.int64, device=unit.device)
    chosen[0] = most_isolated(unit) if weight is None else finite(weight).argmax()
    nearest = torch.full((length,), torch.inf, device=unit.device)
    bounds = torch.full((length,), torch.inf, device=unit.device)
    seen = torch.zeros(length, dtype=torch.int64, device=unit.device)
    # A negative weight turns the distance around: its product rises, and no old value bounds it.
    falling = weight is None or not bool((weight < 0).any())

    def refresh(rows: Tensor, done: int) -> None:
        unseen = chosen[int(seen[rows].min()) : done]
        nearest[rows] = torch.minimum(nearest[rows], 1 - (unit[rows] @ unit[unseen].T).amax(1))
        value = nearest[rows] if weight is None else finite(weight[rows] * nearest[rows])
        bounds[rows] = torch.where(bounds[rows] == -torch.inf, bounds[rows], value)
        seen[rows] = done

    everything = torch.arange(length, device=unit.device)
    bounds[chosen[0]] = -torch.inf
    for done in range(1, budget):
        if done == 1 or not falling:
            refresh(everything, done)
        row = lazy_top(bounds, seen, done, 1, lambda rows, done=done: refresh(rows, done))
        chosen[done] = row
        bounds[row] = -torch.inf
    return chosen
