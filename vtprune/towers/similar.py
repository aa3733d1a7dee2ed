# SPDX-License-Identifier: Apache-2.0
"""One of every pair of most similar patches goes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .method import Patches, Rebuild, TowerChoice, TowerMethod


@dataclass
class Similar(TowerMethod):
    """Bipartite matching as in token merging: of the most similar pairs one patch goes and copies its partner.

    After https://arxiv.org/abs/2210.09461, without averaging. In every round the units that are left are dealt
    alternately into two halves; each of the first half finds its partner of largest cosine in the second (ties: the
    smaller number); the pairs of largest cosine lose their first, as many as the budget asks for. Where more than half
    must go, further rounds follow among what is left. A dropped patch is from then on the copy of its partner, or of
    its partner's partner where that went in a later round, at the same place in the merge group.
    """

    def choose(self, patches: Patches) -> TowerChoice:
        assert patches.budgets is not None
        means, keep, partner = nn.functional.normalize(patches.per_unit(patches.states), dim=-1), [], []
        starts, ends = patches.unit_offsets[:-1].tolist(), patches.unit_offsets[1:].tolist()
        for start, end, budget in zip(starts, ends, patches.budgets.tolist(), strict=True):
            stays, copies = match(means[start:end], budget)
            keep.append(stays)
            partner.append(copies + start)
        stays, copies = torch.cat(keep)[patches.unit], torch.cat(partner)
        dropped = (~stays).nonzero()[:, 0]
        return TowerChoice(stays, Rebuild(dropped, _same_place(patches, copies)[dropped][:, None], residual=False))


def match(units: Tensor, budget: int) -> tuple[Tensor, Tensor]:
    """Rounds of bipartite matching.

    Args:
        units: `[U, D]` of length one.
        budget: How many stay.

    Returns:
        tuple: `[U]` bool which stay, and `[U]` which of those each one is a copy of (itself where it stays).
    """
    left = torch.arange(len(units), device=units.device)
    copy = left.clone()
    while len(left) > budget:
        first, second = left[::2], left[1::2]
        if not len(second):
            break
        cosine, partner = (units[first] @ units[second].t()).max(1)
        gone = torch.sort(cosine, descending=True, stable=True).indices[: len(left) - budget]
        copy[first[gone]] = second[partner[gone]]
        staying = torch.ones(len(units), dtype=torch.bool, device=units.device)
        staying[first[gone]] = False
        left = left[staying[left]]
        copy = copy[copy]  # partners that went in this round are followed to theirs
    stays = torch.zeros(len(units), dtype=torch.bool, device=units.device)
    stays[left] = True
    return stays, copy


def _same_place(patches: Patches, copies: Tensor) -> Tensor:
    """`[N]` for each patch the one at the same place of the unit that its unit is a copy of."""
    order = torch.sort(patches.unit, stable=True).indices
    sizes = torch.bincount(patches.unit, minlength=len(copies))
    starts = nn.functional.pad(sizes.cumsum(0), (1, 0))
    inside = torch.empty_like(order)
    inside[order] = torch.arange(len(order), device=order.device) - starts[patches.unit[order]]
    return order[starts[copies[patches.unit]] + inside]
