# SPDX-License-Identifier: Apache-2.0
"""The rule of PixelPrune: which cells of a picture (squares of patches) differ from the neighbor that predicts them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..core.options import AboveZero, AtLeastZero
from .pictures import Grid

Distance = Literal["max", "mean", "rms"]


@dataclass
class PixelRule:
    """Options of the rule, shared by the tower method and the decoder method `pixels`.

    Attributes:
        tolerance: Largest distance at which two cells are similar, for pixels in the range 0 to 1. 0 is equality.
            Pictures from JPEG files need 0.02 to 0.05.
        distance: Largest, mean absolute or root mean square difference of the pixels.
        anchored: Compare with the representatives of neighbors, so that errors do not add up along a chain.
        image_std: Standard deviation by which the processor divided, one or for each channel; matters above 0.
    """

    tolerance: AtLeastZero = 0.0
    distance: Distance = "max"
    anchored: bool = True
    image_std: AboveZero | tuple[AboveZero, ...] = 0.5

    def predict(self, pixels: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """Compares the cells of a picture, or of each frame of a clip, with their predictors.

        Args:
            pixels: `[n, F]` pixels of the patches, channel by channel, as the processor normalized them.
            grid: Places of the patches.

        Returns:
            tuple: For every cell, frame by frame in raster order, the distance to its predictor, `[C]`, infinite for
            the first of a frame; and the number of the predictor, `[C]`, its own for the first.
        """
        std = torch.as_tensor(self.image_std, dtype=pixels.dtype, device=pixels.device).reshape(-1)
        pixels = (pixels.reshape(len(pixels), len(std), -1) * std[:, None]).flatten(1)
        rows, cols = grid.rows // grid.merge, grid.cols // grid.merge
        cells = pixels[grid.cells().to(pixels.device)].reshape(grid.frames, rows, cols, -1)
        found = [predict(frame, self.tolerance, self.distance, self.anchored) for frame in cells]
        starts = torch.arange(grid.frames, device=pixels.device)[:, None, None] * rows * cols
        return torch.stack([off for off, _ in found]).flatten(), (torch.stack([s for _, s in found]) + starts).flatten()


def predict(cells: Tensor, tolerance: float, distance: Distance, anchored: bool) -> tuple[Tensor, Tensor]:
    """Compares the cells of one picture with their predictors.

    Args:
        cells: `[rows, cols, F]` pixels on the scale from 0 to 1.
        tolerance, distance, anchored: See `PixelRule`.

    Returns:
        tuple: `[rows, cols]` distances to the predictor, infinite for the first cell; and its raster number, their own
        for the first cell.
    """
    if tolerance > 0 and anchored:
        return _predict_anchored(cells, tolerance, distance)
    rows, cols = cells.shape[:2]
    across = _distance(cells[:, 1:], cells[:, :-1], distance)  # [rows, cols - 1] to the left
    down = _distance(cells[1:], cells[:-1], distance)  # [rows - 1, cols] to above
    number = torch.arange(rows * cols, device=cells.device).reshape(rows, cols)
    source, off = number.clone(), torch.full((rows, cols), torch.inf, device=cells.device, dtype=torch.float32)
    source[:, 1:], off[:, 1:] = number[:, :-1], across
    source[1:, 0], off[1:, 0] = number[:-1, 0], down[:, 0]
    above_left_is_left = down[:, :-1] <= tolerance  # C is similar to A
    above_left_is_above = across[:-1] <= tolerance  # C is similar to B
    use_above = above_left_is_left & ~above_left_is_above
    source[1:, 1:] = torch.where(use_above, number[:-1, 1:], source[1:, 1:])
    off[1:, 1:] = torch.where(use_above, down[:, 1:], off[1:, 1:])
    return off, source


def _distance(a: Tensor, b: Tensor, kind: Distance) -> Tensor:
    difference = (a - b).abs()
    if kind == "max":
        return difference.amax(-1)
    return difference.mean(-1) if kind == "mean" else difference.square().mean(-1).sqrt()


def _predict_anchored(cells: Tensor, tolerance: float, kind: Distance) -> tuple[Tensor, Tensor]:
    """`predict` with every cell compared to the representatives of its neighbors.

    A cell depends on those to the left, above and above left, so the cells of an anti-diagonal are independent.
    """
    rows, cols = cells.shape[:2]
    flat = cells.flatten(0, 1)
    source = torch.arange(rows * cols, device=cells.device)
    stands = source.clone()  # the representative of each cell
    off = torch.full((rows * cols,), torch.inf, device=cells.device, dtype=torch.float32)
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
    return off.reshape(shape), source.reshape(shape)
