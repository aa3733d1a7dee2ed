# SPDX-License-Identifier: Apache-2.0
"""Average pooling of the visual grid, as a smaller image would have it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.method import Choice, Method
from ..core.options import Count
from ..core.ragged import rank_in_group
from ..core.registry import register
from ..core.spread import spread
from ..core.tokens import Tokens
from ..vision.crops import by_crop


def cells(row: Tensor, col: Tensor, count: int) -> Tensor:
    """Cuts a grid into exactly `count` connected cells of nearly equal size and shape.

    The rows are cut into bands, every band into pieces from left to right.

    Args:
        row, col: `[n]` grid row and column of each token.
        count: Number of cells, from 1 to `n`.

    Returns:
        Tensor: `[n]` cell of each token; no cell is empty.
    """
    line = torch.unique(row, return_inverse=True)[1]
    height = int(line.max()) + 1
    width = len(row) / height
    bands = min(max(round(math.sqrt(count * height / width)), math.ceil(count / width)), height, count)
    band = line * bands // height
    sizes = torch.bincount(band)
    pieces = 1 + spread(sizes - 1, count - bands)  # [bands], none empty, none larger than its band
    by_column = torch.sort(col, stable=True).indices
    order = by_column[torch.sort(band[by_column], stable=True).indices]  # by band, column, row
    starts = sizes.cumsum(0) - sizes
    place = torch.arange(len(row)) - starts[band[order]]
    cell = torch.empty_like(band)
    cell[order] = (pieces.cumsum(0) - pieces)[band[order]] + place * pieces[band[order]] // sizes[band[order]]
    return cell


def centers(row: Tensor, col: Tensor, cell: Tensor) -> Tensor:
    """`[cells]` index of the token nearest to the middle of each cell; ties go to the smaller index."""
    sizes = torch.bincount(cell)
    away = torch.zeros(len(cell), dtype=torch.float32)
    for axis in (row.float(), col.float()):
        middle = torch.zeros(len(sizes), dtype=torch.float32).index_add_(0, cell, axis) / sizes
        away += (axis - middle[cell]).square()
    order = torch.sort(cell, stable=True).indices
    offsets = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
    return order[rank_in_group(-away[order], offsets) == 0]


@register("pooling")
@dataclass
class Pooling(Method):
    """Averages the tokens of each crop and frame over as many grid cells as its budget has tokens.

    No paper; the control for methods that merge. Crops and frames share the budget in proportion to their sizes. A
    merged token takes the place of the token nearest to the middle of its cell. Tokens outside the grid (newlines) are
    dropped first; for models without grid positions, neighbors in the prompt are averaged.

    Attributes:
        layer: Decoder layer before which hidden states are averaged; 0 is before the decoder.
    """

    differentiable = True
    layer: Count = 0

    def choose(self, tokens: Tokens) -> Choice:
        row, col = tokens.grid_row.cpu(), tokens.grid_col.cpu()
        col = torch.where(row < 0, tokens.index.cpu(), col)
        weights = torch.zeros(len(tokens), dtype=torch.float32)
        for rows, _, _ in by_crop(tokens).each():
            weights[rows.cpu()] = len(rows)
        keep = torch.zeros(len(tokens), dtype=torch.bool)
        groups, taken, count = torch.full((len(tokens),), -1), [], 0
        for rows, budget, placed in by_crop(tokens, weights=weights).each():
            rows = rows.cpu()
            if not placed or budget == 0:
                keep[rows[:budget]] = True
                continue
            cell = cells(row[rows], col[rows], budget)
            groups[rows] = cell + count
            taken.append(rows[centers(row[rows], col[rows], cell)])
            count += budget
        if not taken:
            return Choice(keep.to(tokens.hidden.device))
        device, where = tokens.hidden.device, torch.cat(taken)
        keep[where] = True
        members = (groups >= 0).nonzero()[:, 0]
        numbers, members = groups[members].to(device), members.to(device)
        total = tokens.hidden.new_zeros(count, tokens.hidden.shape[1], dtype=torch.float32)
        total.index_add_(0, numbers, tokens.hidden[members].float())
        hidden = tokens.hidden.clone()
        hidden[where.to(device)] = (total / torch.bincount(numbers, minlength=count)[:, None]).to(hidden)
        return Choice(keep.to(device), hidden)
