# SPDX-License-Identifier: Apache-2.0
"""Tower method PixelPrune: keeps the patches whose pixels differ from those of a predicting neighbor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..core.options import AboveZero, AtLeastZero, Count
from ..errors import UnsupportedModelError
from .method import Patches, Rebuild, TowerChoice, TowerMethod

Distance = Literal["max", "mean", "rms"]


@dataclass
class Pixels(TowerMethod):
    """PixelPrune: drops cells (merge groups) of patches that are similar to a predicting neighbor, before block 0.

    Paper: https://arxiv.org/abs/2604.00886. With A the cell to the left, B above and C above left, a cell is predicted
    by A in the first row, by B in the first column, else by B if C is similar to A and not to B, else by A. The first
    cell stays; any other stays unless its distance to its predictor is at most `tolerance`. After the cut, a dropped
    patch is a copy of its representative: its predictor, or the representative of that.

    By default the number of kept cells depends on the picture. With `keep`, cells are ranked: the first cell, then the
    others that the rule keeps, then the rest, each by falling distance to their predictor and ties in raster order.

    Differences from the release: frames of a clip are predicted one by one; `keep`; any tower whose pixels come in
    whole patches; a dropped patch has a state again after every block (the release removes it from the prompt too, see
    the decoder method "pixels").

    Attributes:
        keep: Share or number of cells to keep; None keeps those that the rule keeps.
        tolerance: Largest distance at which two cells are similar, for pixels in the range 0 to 1. 0 is equality.
            Pictures from JPEG files need 0.02 to 0.05.
        distance: Largest, mean absolute or root mean square difference of the pixels.
        anchored: Compare with the representatives of neighbors, so that errors do not add up along a chain.
        image_std: Standard deviation by which the processor divided, one or for each channel; matters above 0.
    """

    keep: float | int | None = None
    block: Count | None = 0
    tolerance: AtLeastZero = 0.0
    distance: Distance = "max"
    anchored: bool = True
    image_std: AboveZero | tuple[AboveZero, ...] = 0.5

    needs_budget: ClassVar[bool] = False

    def choose(self, patches: Patches) -> TowerChoice:
        pixels = patches.pixels()
        spread = torch.as_tensor(self.image_std, dtype=pixels.dtype, device=pixels.device).reshape(-1)
        pixels = (pixels.reshape(len(pixels), len(spread), -1) * spread[:, None]).flatten(1)
        keep, represented = [], []
        for number, grid in enumerate(patches.grids):
            start, end = patches.offsets[number : number + 2].tolist()
            if grid is None:
                raise UnsupportedModelError(
                    "vtprune.towers.Pixels predicts a patch from its neighbors, and the grid of a picture of "
                    f"{end - start} patches is unknown; choose a tower method that reads states, such as "
                    "vtprune.towers.Change"
                )
            cells = grid.cells()  # [C, m * m]
            rows, cols = grid.rows // grid.merge, grid.cols // grid.merge
            of_cells = pixels[start:end][cells.to(pixels.device)].flatten(1).reshape(grid.frames, rows, cols, -1)
            found = [predict(frame, self.tolerance, self.distance, self.anchored) for frame in of_cells]
            new, off = (torch.stack([f[i] for f in found]).flatten().cpu() for i in (0, 1))
            source = torch.stack([f[2] for f in found]).reshape(grid.frames, -1).cpu()
            source = (source + torch.arange(grid.frames)[:, None] * rows * cols).flatten()
            stays = new if patches.budgets is None else rank(new, off, int(patches.budgets[number]))
            source = torch.where(stays, torch.arange(len(stays)), source)
            source = _roots(source)
            kept, copies = torch.empty(end - start, dtype=torch.bool), torch.empty(end - start, dtype=torch.int64)
            kept[cells] = stays[:, None].expand_as(cells)
            copies[cells] = cells[source] + start
            keep.append(kept)
            represented.append(copies)
        stays = torch.cat(keep)
        dropped = (~stays).nonzero()[:, 0]
        rebuild = Rebuild(dropped, torch.cat(represented)[dropped][:, None], residual=False)
        return TowerChoice(stays.to(patches.states.device), rebuild)


def predict(cells: Tensor, tolerance: float, distance: Distance, anchored: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Compares the cells of one picture with their predictors.

    Args:
        cells: `[rows, cols, F]` pixels on the scale from 0 to 1.
        tolerance, distance, anchored: See `Pixels`.

    Returns:
        tuple: `[rows, cols]` bool, cells that differ from their predictor; distances to it, infinite for the first
        cell; and the raster number of the predictor (its own for the first cell).
    """
    if tolerance > 0 and anchored:
        return _predict_anchored(cells, tolerance, distance)
    rows, cols = cells.shape[:2]
    across = _distance(cells[:, 1:], cells[:, :-1], distance)  # [rows, cols - 1] to the left
    down = _distance(cells[1:], cells[:-1], distance)  # [rows - 1, cols] to above
    number = torch.arange(rows * cols, device=cells.device).reshape(rows, cols)
    source, off = number.clone(), torch.full((rows, cols), torch.inf, device=cells.device)
    source[:, 1:], off[:, 1:] = number[:, :-1], across
    source[1:, 0], off[1:, 0] = number[:-1, 0], down[:, 0]
    above_left_is_left = down[:, :-1] <= tolerance  # C is similar to A
    above_left_is_above = across[:-1] <= tolerance  # C is similar to B
    use_above = above_left_is_left & ~above_left_is_above
    source[1:, 1:] = torch.where(use_above, number[:-1, 1:], source[1:, 1:])
    off[1:, 1:] = torch.where(use_above, down[:, 1:], off[1:, 1:])
    return ~(off <= tolerance), off, source


def _distance(a: Tensor, b: Tensor, kind: Distance) -> Tensor:
    difference = (a - b).abs()
    if kind == "max":
        return difference.amax(-1)
    return difference.mean(-1) if kind == "mean" else difference.square().mean(-1).sqrt()


def _predict_anchored(cells: Tensor, tolerance: float, kind: Distance) -> tuple[Tensor, Tensor, Tensor]:
    """`predict` with every cell compared to the representatives of its neighbors.

    A cell depends on those to the left, above and above left, so the cells of an anti-diagonal are independent.
    """
    rows, cols = cells.shape[:2]
    flat = cells.flatten(0, 1)
    source = torch.arange(rows * cols, device=cells.device)
    stands = source.clone()  # the representative of each cell
    off = torch.full((rows * cols,), torch.inf, device=cells.device)
    for diagonal in range(1, rows + cols - 1):
        row = torch.arange(max(0, diagonal - cols + 1), min(diagonal, rows - 1) + 1, device=cells.device)
        here = row * cols + diagonal - row
        first_row, first_col = row == 0, row == diagonal
        left = torch.where(first_col, here - cols, here - 1)  # the only neighbor in the first column is above
        above = torch.where(first_row, left, here - cols)
        corner = torch.where(first_row | first_col, left, here - cols - 1)
        by_left, by_above, by_corner = flat[stands[left]], flat[stands[above]], flat[stands[corner]]
        use_above = (_distance(by_corner, by_left, kind) <= tolerance) & (
            _distance(by_corner, by_above, kind) > tolerance
        )
        by = torch.where(use_above, above, left)
        source[here] = by
        off[here] = distance = _distance(flat[here], flat[stands[by]], kind)
        stands[here] = torch.where(distance <= tolerance, stands[by], here)
    shape = (rows, cols)
    return ~(off <= tolerance).reshape(shape), off.reshape(shape), source.reshape(shape)


def rank(new: Tensor, off: Tensor, budget: int) -> Tensor:
    """Keep mask `[C]` of `budget` cells: new ones first, by falling distance to their predictor, then raster order."""
    order = torch.sort(off, descending=True, stable=True).indices
    order = torch.cat([order[new[order]], order[~new[order]]])
    keep = torch.zeros_like(new)
    keep[order[:budget]] = True
    return keep


def _roots(source: Tensor) -> Tensor:
    """Follows each number along `source` to one that is its own source."""
    while True:
        further = source[source]
        if torch.equal(further, source):
            return source
        source = further
