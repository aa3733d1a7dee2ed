# SPDX-License-Identifier: Apache-2.0
"""Tower method PixelPrune: keeps the patches whose pixels differ from those of a predicting neighbor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..core.options import Count
from ..errors import UnsupportedModelError
from ..vision.prediction import PixelRule
from .method import Patches, Rebuild, TowerChoice, TowerMethod


@dataclass
class Pixels(PixelRule, TowerMethod):
    """PixelPrune: drops cells (merge groups) of patches that are similar to a predicting neighbor, before block 0.

    Paper: https://arxiv.org/abs/2604.00886. With A the cell to the left, B above and C above left, a cell is predicted
    by A in the first row, by B in the first column, else by B if C is similar to A and not to B, else by A. The first
    cell stays; any other stays unless its distance to its predictor is at most `tolerance`. After the cut, a dropped
    patch is a copy of its representative: its predictor, or the representative of that.

    By default the number of kept cells depends on the picture. With `keep`, cells are ranked: the first cell, then the
    others that the rule keeps, then the rest, each by falling distance to their predictor and ties in raster order.

    Differences from the release: the frames of a clip are predicted one by one (two that share a patch, together: the
    release reads the first of them); `keep`; any tower whose pixels come in whole patches; a dropped patch has a state
    again after every block (the release removes it from the prompt too, see the decoder method "pixels").

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

    needs_budget: ClassVar[bool] = False
    needs_states: ClassVar[bool] = False

    def choose(self, patches: Patches) -> TowerChoice:
        pixels = patches.pixels()
        keep, represented = [], []
        for number, grid in enumerate(patches.grids):
            start, end = patches.offsets[number : number + 2].tolist()
            if grid is None:
                raise UnsupportedModelError(
                    "vtprune.towers.Pixels predicts a patch from its neighbors, and the grid of a picture of "
                    f"{end - start} patches is unknown; choose a tower method that reads states, such as Change"
                )
            off, source = (found.cpu() for found in self.predict(pixels[start:end], grid))
            stays = off > self.tolerance
            if patches.budgets is not None:
                stays = torch.zeros_like(stays)
                stays[torch.sort(off, descending=True, stable=True).indices[: int(patches.budgets[number])]] = True
            cells = grid.cells()  # [C, m * m]
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


def _roots(source: Tensor) -> Tensor:
    """Follows each number along `source` to one that is its own source."""
    while True:
        further = source[source]
        if torch.equal(further, source):
            return source
        source = further
