# SPDX-License-Identifier: Apache-2.0
"""The row whose nearest other row is farthest away, found without computing all pairs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import threshold

from .._cosine import Cosine
from .._lazy import lazy_top
from .naive import COPY, distances

_NEARBY, _BATCH, _SCOUTS, _FEW = 64, 256, 16, 8
_STEP = 999983  # a prime: stepping by it spreads the columns over the whole group
_COPY = 40 * 2**20  # largest size of a rounded copy in bytes


def screen_of(cosine: Cosine) -> Cosine:
    """Cosines for screening: in bfloat16 if the processor multiplies it in hardware, else in the given dtype."""
    rows = cosine.rows
    abilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    fast = abilities.get("avx512_bf16", False) and rows.device.type == "cpu" and torch.backends.mkldnn.is_available()
    return cosine.rounded(torch.bfloat16) if fast and 2 * rows.numel() <= _COPY else cosine


class _Race:
    """Screening of rows: an approximate nearest other row of each, and the rows that may be the most isolated one."""

    def __init__(self, screen: Cosine) -> None:
        self.screen = self.among = screen
        self.everything = self.racing = torch.arange(len(screen), device=screen.rows.device)
        self.nearest = torch.full((len(screen),), torch.inf, device=screen.rows.device, dtype=torch.float32)
        self.partner = (self.everything + 1) % len(screen)  # any other row gives a bound
        self.to_beat = -torch.inf

    def learn(self, rows: Tensor, distance: Tensor, partner: Tensor) -> None:
        """Updates the nearest known distances of `rows` with their distances `[R]` to the rows `partner` `[R]`."""
        closer = distance < self.nearest[rows]
        self.nearest[rows] = torch.where(closer, distance, self.nearest[rows])
        self.partner[rows] = torch.where(closer, partner, self.partner[rows])

    def neighbors(self) -> None:
        """Compares rows within blocks of consecutive rows, which are often similar."""
        distance = 1 - self.screen.nearby(_NEARBY)
        distance.diagonal(dim1=1, dim2=2).fill_(torch.inf)
        least, place = distance.min(2)  # [blocks, _NEARBY]
        rows = self.everything[: least.numel()]
        self.learn(rows, least.flatten(), place.flatten() + rows // _NEARBY * _NEARBY)

    def meet(self, rows: Tensor) -> None:
        """Compares `rows` with the remaining candidates, and removes candidates that can no longer win.

        As long as all rows are candidates, `rows` are compared with all others, so their nearest distance is known and
        raises the bound to beat.
        """
        distance = 1 - self.screen.between(rows, self.among)
        distance.masked_fill_(rows[:, None] == self.racing, torch.inf)
        least, place = distance.min(0)
        self.learn(self.racing, least, rows[place])
        if self.among is self.screen:
            least, place = distance.min(1)
            self.learn(rows, least, place)
            self.to_beat = max(self.to_beat, float(least.amax()))
        alive = self.nearest[self.racing] >= self.to_beat
        if int(alive.sum()) < 0.7 * len(alive):
            self.racing, self.among = self.racing[alive], self.among.subset(alive.nonzero().squeeze(1))

    def promising(self, count: int) -> Tensor:
        """The `count` candidates with the largest nearest known distance."""
        return self.racing[self.nearest[self.racing].topk(min(count, len(self.racing))).indices]

    def run(self) -> None:
        """Runs until few candidates are left."""
        left = torch.ones_like(self.everything, dtype=torch.bool)
        for count in (_SCOUTS, _BATCH):
            if len(self.racing) > _FEW:
                rows = self.promising(count)
                self.meet(rows)
                left[rows] = False
        rest = left.nonzero().squeeze(1)
        rest = rest[self.everything[: len(rest)] * _STEP % max(len(rest), 1)]
        for rows in rest.split(_BATCH):
            if len(self.racing) <= _FEW:
                break
            if self.among is not self.screen:
                self.scout()
            self.meet(rows)

    def scout(self) -> None:
        """Raises the bound to beat, by comparing the most promising candidates with all rows."""
        rows = self.promising(_SCOUTS)
        distance = 1 - self.screen.between(rows, self.screen)
        distance[self.everything[: len(rows)], rows] = torch.inf
        least, place = distance.min(1)
        self.learn(rows, least, place)
        self.to_beat = max(self.to_beat, float(least.amax()))


def most_isolated(cosine: Cosine) -> Tensor:
    """The row `[1]` with the largest distance, in float32, to its nearest other row.

    The distance to any other row is an upper bound of the distance to the nearest. So it is enough to find a near row
    for every candidate, with products in low precision: only the distance to that row is computed again in float32, so
    that no bound depends on the rounding of the screening. Then rows are compared with all others in float32, in order
    of falling bounds, until none is left that could win.
    """
    length, device = len(cosine), cosine.rows.device
    everything = torch.arange(length, device=device)
    nearest = torch.full((length,), torch.inf, device=device, dtype=torch.float32)
    exact = torch.zeros(length, dtype=torch.int64, device=device)

    def probe(rows: Tensor) -> None:
        distance = distances(cosine(rows))  # [p, n]
        distance[everything[: len(rows)], rows] = torch.inf
        nearest.copy_(torch.minimum(nearest, distance.amin(0)))
        nearest[rows] = torch.minimum(nearest[rows], distance.amin(1))
        exact[rows] = 1

    if length > 4 * _NEARBY:
        race = _Race(screen_of(cosine))
        race.neighbors()
        race.run()
        nearest = threshold(race.nearest, COPY, 0.0) if race.screen is cosine else distances(cosine.pairs(race.partner))
        probe(nearest.topk(_FEW).indices)
    # Two rows that are each other's nearest have exactly the same value here, so that the smaller row wins.
    return lazy_top(nearest, exact, 1, 1, probe)
