# SPDX-License-Identifier: Apache-2.0
"""Padding tokens of pictures that were padded to a square, computed from the picture's size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from ...core.options import Share, check_options
from ...core.tokens import Tokens
from ...errors import MethodError, one_line

_CELL = 14  # side of a grid cell in pixels, as in the released formula, whose rounding depends on it


@dataclass(frozen=True)
class PaddingRule:
    """When a grid cell that is partly padding counts as padding.

    Attributes:
        kind: `"area"`: if more than `threshold` of its area is padding; `"bilinear"`: by a 0/1 mask resized to the
            grid; `"integer"`: outside a centered band of `int(short * cells / long)` cells.
        threshold: Share of the area, for `"area"`.
    """

    kind: Literal["area", "bilinear", "integer"] = "area"
    threshold: Share = 0.5

    def __post_init__(self) -> None:
        check_options(self)

    def band(self, short: int, long: int, cells: int) -> Tensor:
        """`[cells]` bool across a square of side `long`: True inside the centered picture of width `short`."""
        if self.kind == "integer":
            shown = int(short * cells / long)
            margin = (cells - shown) // 2
            return torch.tensor([margin <= cell < margin + shown for cell in range(cells)])
        if self.kind == "bilinear":
            strip = Image.new("L", (1, long), 0)
            strip.paste(Image.new("L", (1, short), 1), (0, (long - short) // 2))
            return torch.tensor(list(strip.resize((1, cells), Image.Resampling.BILINEAR).tobytes())) >= 1
        size = cells * _CELL
        before = (long - short) / (2 * long) * size
        overlap = [max(0, min((c + 1) * _CELL, size - before) - max(c * _CELL, before)) for c in range(cells)]
        return torch.tensor([1 - o * _CELL / (_CELL * _CELL) <= self.threshold for o in overlap])

    def grid(self, height: int, width: int, cells: int) -> Tensor:
        """`[cells, cells]` bool, True inside a picture of this size after padding to a square."""
        band = self.band(min(height, width), max(height, width), cells)
        return band[:, None].expand(-1, cells) if height < width else band[None].expand(cells, -1)


def shown(tokens: Tokens, rule: PaddingRule, sizes: Sequence[Sequence[int]] | None = None) -> Tensor:
    """Mask of the visual tokens that are not padding.

    A picture counts as padded if its size is known and not square, and the picture is one undivided square grid of
    tokens: crops of any-resolution layouts are stretched or unpadded by their models, and grids of native resolution
    follow the picture.

    Args:
        tokens: All visual tokens, before any cut.
        rule: When a cell at the border counts as padding.
        sizes: Height and width of every picture of the call, in order; by default its `image_sizes`.

    Returns:
        Tensor: `[M]` bool.

    Raises:
        MethodError: The number of `sizes` is not the number of pictures.
    """
    out = torch.ones(len(tokens), dtype=torch.bool)
    given = tokens.inputs.get("image_sizes") if sizes is None else sizes
    if given is None:
        return out.to(tokens.hidden.device)
    known = _pairs(given) if sizes is not None else torch.as_tensor(given).tolist()
    image, feature, crop, row, col = (
        x.cpu() for x in (tokens.image, tokens.feature, tokens.crop, tokens.grid_row, tokens.grid_col)
    )
    count = int(image.max()) + 1
    first = torch.full((count,), -1.0, dtype=torch.float32).scatter_reduce_(
        0, image, feature.float(), "amin", include_self=False
    )
    # Pictures that the attention mask hides have no tokens here; each comes after the one before it.
    first = torch.where(first < 0, first.cummax(0).values + torch.arange(count) / count, first)
    pictures = torch.unique(first, return_inverse=True)[1].tolist()  # beams share pictures
    if sizes is not None and len(known) != len(set(pictures)):
        raise MethodError(
            f"sizes has {len(known)} entries, the call {len(set(pictures))} pictures; pass one entry per picture"
        )
    for number, picture in enumerate(pictures):
        height, width = known[picture] if picture < len(known) else (1, 1)  # videos come after the images
        here = (image == number).nonzero().flatten()
        if height == width or not len(here) or bool(((crop[here] != 0) | (row[here] < 0)).any()):
            continue
        cells = int(row[here].max()) + 1
        if int(col[here].max()) + 1 == cells and len(here) == cells * cells:
            out[here] = rule.grid(int(height), int(width), cells)[row[here], col[here]]
    return out.to(tokens.hidden.device)


def _pairs(sizes: Sequence[Sequence[int]]) -> list[list[int]]:
    """`sizes` as lists; `MethodError` where they are no heights and widths."""
    try:
        found = torch.as_tensor(sizes)
    except (TypeError, ValueError, RuntimeError) as error:
        raise MethodError(f"sizes are not a height and a width of each picture: {one_line(error)}") from error
    if found.dim() != 2 or found.shape[1] != 2 or found.is_floating_point() or not bool((found > 0).all()):
        raise MethodError(f"sizes are {sizes!r}; expected a height and a width of each picture, [n, 2], in pixels")
    return found.tolist()
