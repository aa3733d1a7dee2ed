# SPDX-License-Identifier: Apache-2.0
"""The row whose nearest other row is farthest away, without all pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from .._cosine import Cosine
from .._lazy import lazy_top

_NEARBY, _BATCH, _PROBES = 64, 64, 16
_STEP = 999983  # a prime: stepping by it spreads the columns over the whole pool


def _promising(nearest: Tensor, exact: Tensor, count: int) -> Tensor:
    """`count` rows whose bounds are largest and not exact yet."""
    return nearest.masked_fill(exact > 0, -torch.inf).topk(count).indices


def most_isolated(cosine: Cosine) -> Tensor:
    """`[1]` row with the largest distance to its nearest other row.

    The distance to any other row bounds the distance to the nearest from above. Rows in order are often alike, so
    neighbours are compared first. Then the most promising rows are compared with all, which also lowers everybody
    else's bound, and once few are left in the race, batches of rows from everywhere with these alone.
    """
    length, device = len(cosine), cosine.rows.device
    everything = torch.arange(length, device=device)
    nearest = torch.full((length,), torch.inf, device=device)
    exact = torch.zeros(length, dtype=torch.int64, device=device)

    def probe(rows: Tensor) -> None:
        distance = 1 - cosine(rows)  # [p, n]
        distance[everything[: len(rows)], rows] = torch.inf
        nearest.copy_(torch.minimum(nearest, distance.amin(0)))
        nearest[rows] = torch.minimum(nearest[rows], distance.amin(1))
        exact[rows] = 1

    if length > 4 * _NEARBY:
        distance = 1 - cosine.nearby(_NEARBY)
        distance.diagonal(dim1=1, dim2=2).fill_(torch.inf)
        nearest[: distance.shape[0] * _NEARBY] = distance.amin(2).flatten()
        racing, among, columns = everything, cosine, everything
        while len(racing) > 2 * _BATCH and len(columns):
            if among is cosine:
                probe(_promising(nearest, exact, _BATCH))
            else:
                batch, columns = columns[:_BATCH], columns[_BATCH:]
                distance = 1 - cosine.between(batch, among)  # [batch, racing]
                distance.masked_fill_(batch[:, None] == racing, torch.inf)
                nearest[racing] = torch.minimum(nearest[racing], distance.amin(0))
            alive = nearest[racing] > nearest[exact > 0].amax()
            if int(alive.sum()) < 0.7 * len(racing):
                if among is cosine:
                    columns = (exact == 0).nonzero().squeeze(1)
                    columns = columns[everything[: len(columns)] * _STEP % len(columns)]
                probe(_promising(nearest, exact, _PROBES))
                racing = racing[nearest[racing] > nearest[exact > 0].amax()]
                among = cosine.subset(racing)
    # Two rows that are each other's nearest get the same number here, however it was rounded: the smaller row wins.
    return lazy_top(nearest, exact, 1, 1, probe)
