# SPDX-License-Identifier: Apache-2.0
"""Evenly spaced tokens, as plain downsampling of the grid would keep them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..core.method import Choice, Method
from ..core.registry import register
from ..core.spread import spread, spread_grid
from ..core.tokens import Tokens


@register("uniform")
@dataclass
class Uniform(Method):
    """Keeps an evenly spaced subset of each group, before the decoder.

    No paper; the control for methods that claim to know which tokens matter. Each image, frame and crop of a group gets
    its proportional share of the budget (long videos: evenly over time) and keeps as regular a sub-grid as the exact
    count allows. Tokens outside a grid (newlines, separators, models without grid positions) are spaced by their index,
    separately for each image and frame.
    """

    def choose(self, tokens: Tokens) -> Choice:
        crop = torch.where(tokens.grid_row < 0, -1, tokens.crop)
        keys = torch.stack([tokens.group, tokens.image, tokens.frame, crop]).cpu()  # [4, M]
        parts, part = torch.unique(keys, dim=1, return_inverse=True)  # sorted by group first
        rows = tokens.grid_row.cpu()
        sizes = torch.bincount(part, minlength=parts.shape[1])
        keep = torch.zeros(len(tokens), dtype=torch.bool)
        members = torch.sort(part, stable=True).indices.split(sizes.tolist())
        for group, budget in enumerate(tokens.budgets.tolist()):
            mine = (parts[0] == group).nonzero().flatten()
            for number, count in zip(mine.tolist(), spread(sizes[mine], budget).tolist(), strict=True):
                where = members[number]
                if parts[3, number] < 0:
                    marked = spread(torch.ones_like(where), count) > 0
                else:
                    where = where[torch.sort(rows[where], stable=True).indices]
                    marked = spread_grid(rows[where], count)
                keep[where[marked]] = True
        return Choice(keep.to(tokens.hidden.device))
