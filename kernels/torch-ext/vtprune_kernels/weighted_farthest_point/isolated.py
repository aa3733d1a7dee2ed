# SPDX-License-Identifier: Apache-2.0
"""The row whose nearest other row is farthest away, without all pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from .._cosine import Cosine
from .._lazy import lazy_top

_NEARBY, _BATCH, _SCOUTS, _FEW = 64, 256, 16, 8
_STEP = 999983  # a prime: stepping by it spreads the columns over the whole group
_COPY = 40 * 2**20  # bytes that a rounded copy may take


def screen_of(cosine: Cosine) -> Cosine:
    """Rows for guesses: in bfloat16 where the processor multiplies that in hardware, else the rows as they are."""
    rows = cosine.rows
    abilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    fast = abilities.get("avx512_bf16", False) and rows.device.type == "cpu" and torch.backends.mkldnn.is_available()
    return cosine.rounded(torch.bfloat16) if fast and 2 * rows.numel() <= _COPY else cosine


class _Race:
    """Guesses of every row's nearest other row, and which rows may still be the most isolated one."""

    def __init__(self, screen: Cosine) -> None:
        self.screen = self.among = screen
        self.everything = self.racing = torch.arange(len(screen), device=screen.rows.device)
        self.nearest = torch.full((len(screen),), torch.inf, device=screen.rows.device)
        self.partner = (self.everything + 1) % len(screen)  # any other row gives a bound
        self.to_beat = -torch.inf

    def learn(self, rows: Tensor, distance: Tensor, partner: Tensor) -> None:
        """Notes distances `[R]` of `rows` to the rows in `partner`, where they are less than any before."""
        closer = distance < self.nearest[rows]
        self.nearest[rows] = torch.where(closer, distance, self.nearest[rows])
        self.partner[rows] = torch.where(closer, partner, self.partner[rows])

    def neighbors(self) -> None:
        """Compares rows that lie beside each other: in order, they are often alike."""
        distance = 1 - self.screen.nearby(_NEARBY)
        distance.diagonal(dim1=1, dim2=2).fill_(torch.inf)
        least, place = distance.min(2)  # [blocks, _NEARBY]
        rows = self.everything[: least.numel()]
        self.learn(rows, least.flatten(), place.flatten() + rows // _NEARBY * _NEARBY)

    def meet(self, rows: Tensor) -> None:
        """Compares `rows` with those in the race, of which some lose it; who has met everybody sets what is to beat."""
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
        """`count` rows of the race that no row near is known of."""
        return self.racing[self.nearest[self.racing].topk(min(count, len(self.racing))).indices]

    def run(self) -> None:
        """Goes on until few rows are left that may beat the best one known."""
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
        """Raises what is to beat: the most promising rows meet everybody."""
        rows = self.promising(_SCOUTS)
        distance = 1 - self.screen.between(rows, self.screen)
        distance[self.everything[: len(rows)], rows] = torch.inf
        least, place = distance.min(1)
        self.learn(rows, least, place)
        self.to_beat = max(self.to_beat, float(least.amax()))


def most_isolated(cosine: Cosine) -> Tensor:
    """`[1]` row with the largest distance to its nearest other row, in float32.

    The distance to any other row bounds the distance to the nearest from above. So it is enough to guess for every row
    which other one is near, with products in low precision and only for as long as the row is in the race: the distance
    to that one is computed again in float32, and no bound depends on the rounding of a guess. Then rows are compared
    with all others in float32, best bound first, until none is left that could win.
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
        race = _Race(screen_of(cosine))
        race.neighbors()
        race.run()
        nearest = race.nearest if race.screen is cosine else 1 - cosine.pairs(race.partner)
        probe(nearest.topk(_FEW).indices)
    # Two rows that are each other's nearest get the same number here, however it was rounded: the smaller row wins.
    return lazy_top(nearest, exact, 1, 1, probe)
