# SPDX-License-Identifier: Apache-2.0
"""Tower method that drops one patch of each of the most similar pairs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.ragged import first_equal
from .method import Patches, Rebuild, TowerChoice, TowerMethod


@dataclass
class Similar(TowerMethod):
    """Bipartite matching as in token merging: of the most similar pairs, one patch is dropped and copies the other.

    After https://arxiv.org/abs/2210.09461, without averaging. In every round, the remaining units are divided
    alternately into two halves; each unit of the first half is paired with the unit of largest cosine similarity in the
    second (ties: the smaller number); of the most similar pairs, the first unit is dropped, as many as the budget
    requires. If more than half must be dropped, further rounds follow. After the cut, a dropped patch is a copy of its
    partner (or of that one's partner, if it was dropped in a later round) at the same place in the merge group.
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
    """Selects units by rounds of bipartite matching.

    Args:
        units: `[U, D]` unit vectors.
        budget: Number of units that stay.

    Returns:
        tuple: `[U]` bool, the units that stay; and `[U]` the one that each is a copy of (itself if it stays).
    """
    left = torch.arange(len(units), device=units.device)
    copy = left.clone()
    while len(left) > budget:
        first, second = left[::2], left[1::2]
        if not len(second):
            break
        cosine, partner = (units[first] @ units[second].t()).max(1)
        partner = first_equal(units[second])[partner]
        same = (units[first] == units[second[partner]]).all(1) & (units[first] != 0).any(1)
        cosine = cosine.masked_fill(same, 1.0)  # equal pairs are told apart by their numbers, not by rounding
        dropped = torch.sort(cosine, descending=True, stable=True).indices[: len(left) - budget]
        copy[first[dropped]] = second[partner[dropped]]
        staying = torch.ones(len(units), dtype=torch.bool, device=units.device)
        staying[first[dropped]] = False
        left = left[staying[left]]
        copy = copy[copy]  # copies of a unit that was dropped in this round become copies of its partner
    stays = torch.zeros(len(units), dtype=torch.bool, device=units.device)
    stays[left] = True
    return stays, copy


def _same_place(patches: Patches, copies: Tensor) -> Tensor:
    """For each patch, the patch `[N]` at the same place in the unit that its unit is a copy of."""
    order = torch.sort(patches.unit, stable=True).indices
    sizes = torch.bincount(patches.unit, minlength=len(copies))
    starts = nn.functional.pad(sizes.cumsum(0), (1, 0))
    inside = torch.empty_like(order)
    inside[order] = torch.arange(len(order), device=order.device) - starts[patches.unit[order]]
    return order[starts[copies[patches.unit]] + inside]
