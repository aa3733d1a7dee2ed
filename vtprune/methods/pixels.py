# SPDX-License-Identifier: Apache-2.0
"""PixelPrune in the decoder: the tokens whose pixels a neighbor does not predict."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core.method import ScoreMethod, Tap
from ..core.registry import register
from ..core.tokens import Tokens
from ..errors import MethodError
from ..vision import block_calls
from ..vision.attention import vision_layers
from ..vision.patch_sizes import PatchSizes
from ..vision.pictures import Layout, find_pictures
from ..vision.prediction import PixelRule
from ..vision.tower import Vision, projector_tap

if TYPE_CHECKING:
    from ..models.anatomy import Anatomy

_GIVEN, _BLOCK = "pixels.given", "pixels.block"  # arguments of the vision tower, and of its first block
_FIRST = 255.0  # above every distance between pixels


@register("pixels")
@dataclass
class Pixels(PixelRule, ScoreMethod):
    """Keeps the tokens whose pixels differ most from the neighbor that predicts them, before the decoder.

    Paper: PixelPrune, arXiv 2604.00886. For documents and screens: text on an empty page is never traded for paper. The
    score of a token is the distance of its pixels to those of the cell to its left or above it that the rule of
    `vtprune.towers.Pixels` predicts it by; the first token of every picture and frame comes first. So the tokens that
    the rule calls new come before all that it would drop.

    Differences from the release: the count is the budget's, not the picture's (where more tokens are new, those that
    differ most stay; where fewer are, the nearest to it follow, then raster order); the frames of a clip are predicted
    one by one (two that share a patch, together: the release reads the first of them); the vision tower is cut by
    `tower=vtprune.towers.Pixels()` only; any model whose tower is given the pixels of whole patches and whose projector
    makes one token of each cell. Newline tokens are dropped first.

    Attributes:
        tolerance: Largest distance at which two cells are similar, for pixels in the range 0 to 1. 0 is equality.
            Pictures from JPEG files need 0.02 to 0.05.
        distance: Largest, mean absolute or root mean square difference of the pixels.
        anchored: Compare with the representatives of neighbors, so that errors do not add up along a chain.
        image_std: Standard deviation by which the processor divided, one or for each channel; matters above 0.
    """

    def taps(self, anatomy: Anatomy) -> Iterable[Tap]:
        tower, block = anatomy.vision_tower, vision_layers(anatomy)[0]
        return (
            projector_tap(anatomy, self.name),
            Tap(_GIVEN, tower, lambda args, kwargs, output: block_calls.named(tower, args, kwargs)),
            Tap(_BLOCK, block, lambda args, kwargs, output: block_calls.named(block, args, kwargs)),
        )

    def score(self, tokens: Tokens) -> Tensor:
        vision = Vision(tokens, self.name)
        calls = vision.calls
        records = [tokens.recorded.get(name, []) for name in (_GIVEN, _BLOCK)]
        if any(len(record) != len(calls) for record in records):
            raise MethodError(
                f"{self.name} recorded {len(records[0])} calls of the vision tower and {len(calls)} of the projector; "
                "expected one each; use another method, such as divprune"
            )
        rows = []
        for given, block, (_, projected, _) in zip(*records, calls, strict=True):
            layout = _layout(vision.anatomy, given, block)
            off = self.distances(layout)
            if len(off) != projected.shape[0] * projected.shape[1]:
                raise MethodError(
                    f"{self.name} found {len(off)} cells of patches for {projected.shape[0] * projected.shape[1]} "
                    "projected tokens; expected one cell for each; choose a method that needs none, such as 'divprune'"
                )
            rows.append(_in_tower_order(off, layout))
        scores = vision.to_tokens(torch.cat(rows).clamp_max(_FIRST)[:, None].to(tokens.hidden.device))[:, 0]
        return scores.nan_to_num(-1.0)

    def distances(self, layout: Layout) -> Tensor:
        """Distance of every cell to its predictor, picture by picture."""
        pixels, found = layout.pixels(), []
        for grid, part in zip(layout.grids, pixels.split(layout.offsets.diff().tolist()), strict=True):
            if grid is None:
                raise MethodError(
                    f"{self.name} predicts a token from its neighbors, and the grid of a picture of {len(part)} "
                    "patches is unknown; choose a method that needs none, such as 'divprune'"
                )
            found.append(self.predict(part, grid)[0])
        return torch.cat(found)


def _in_tower_order(values: Tensor, layout: Layout) -> Tensor:
    """Values `[C]` of cells, given in raster order, in the order in which a tower with windows has the cells."""
    units, start = [], 0
    for grid in layout.grids:
        assert grid is not None
        units.append(grid.units() + start)
        start += len(units[-1])
    return torch.empty_like(values).index_copy_(0, torch.cat(units).to(values.device), values)


def _layout(anatomy: Anatomy, given: dict[str, Any], block: dict[str, Any]) -> Layout:
    """The pictures of one call of the vision tower."""
    states = next(v for v in block.values() if isinstance(v, Tensor) and v.is_floating_point())
    batch, length = (1, len(states)) if states.dim() == 2 else states.shape[:2]
    others = {name: value for name, value in block.items() if value is not states}
    sizes = PatchSizes.of(anatomy)
    offsets = block_calls.Offsets(batch, length).among(others)
    tables = block_calls.tables_among(others, length)
    mask = block_calls.mask_among(others)
    return find_pictures(
        sizes, given, (batch, length), offsets, mask, lambda: _prefix(sizes, given, length), True, tables
    )


def _prefix(sizes: PatchSizes, given: dict[str, Any], length: int) -> Tensor:
    """`[L]` bool: the class and register tokens in front of the patches of a picture."""
    image = next(v for v in given.values() if isinstance(v, Tensor) and v.dim() == 4)
    patches = (image.shape[-2] // sizes.patch[0]) * (image.shape[-1] // sizes.patch[1])
    return torch.arange(length) < length - patches
