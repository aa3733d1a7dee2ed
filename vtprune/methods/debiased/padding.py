# SPDX-License-Identifier: Apache-2.0
"""Which tokens of a picture that was padded to a square show the picture, from its size alone."""

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

_CELL = 14  # pixels of a grid cell in the released formula; its rounding depends on them


@dataclass(frozen=True)
class PaddingRule:
    """How a cell that is part picture, part padding is judged.

    Attributes:
        kind: `"area"`: padding if more than `threshold` of its area is; `"bilinear"`: by a 0/1 picture shrunk to the
            grid; `"integer"`: a centered band of `int(short * cells / long)` cells.
        threshold: For `"area"`.
    """

    kind: Literal["area", "bilinear", "integer"] = "area"
    threshold: Share = 0.5

    def __post_init__(self) -> None:
        check_options(self)

    def band(self, short: int, long: int, cells: int) -> Tensor:
        """`[cells]` bool across a square of side `long`: True where the picture, `short` wide, shows."""
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
        """`[cells, cells]` bool, True where a picture of this size shows after padding to a square."""
        band = self.band(min(height, width), max(height, width), cells)
        return band[:, None].expand(-1, cells) if height < width else band[None].expand(cells, -1)


def shown(tokens: Tokens, rule: PaddingRule, sizes: Sequence[Sequence[int]] | None = None) -> Tensor:
    """Which visual tokens are not padding.

    A picture counts as padded if its size is known and not square, and the picture is one undivided square grid of
    tokens: crops of any-resolution layouts are stretched or unpadded by their models, and grids of native resolution
    follow the picture.

    Args:
        tokens: All visual tokens, before any was dropped.
        rule: How cells at the border are judged.
        sizes: Height and width of every picture of the call, in order; by default what the call says in `image_sizes`.

    Returns:
        Tensor: `[M]` bool.

    Raises:
        MethodError: `sizes` are not as many as there are pictures.
    """
    out = torch.ones(len(tokens), dtype=torch.bool)
    given = tokens.inputs.get("image_sizes") if sizes is None else sizes
    if given is None:
        return out.to(tokens.hidden.device)
    known = _pairs(given) if sizes is not None else torch.as_tensor(given).tolist()
    image, feature, crop, row, col = (
        x.cpu() for x in (tokens.image, tokens.feature, tokens.crop, tokens.grid_row, tokens.grid_col)
    )
    first = torch.zeros(int(image.max()) + 1, dtype=feature.dtype).scatter_reduce_(
        0, image, feature, "amin", include_self=False
    )
    pictures = torch.unique(first, return_inverse=True)[1].tolist()  # beams of a sample show the same ones
    if sizes is not None and len(known) != len(set(pictures)):
        raise MethodError(f"there are sizes of {len(known)} pictures and {len(set(pictures))} pictures in the call")
    for number, picture in enumerate(pictures):
        height, width = known[picture] if picture < len(known) else (1, 1)  # videos come after the images
        here = (image == number).nonzero().flatten()
        if height == width or bool(((crop[here] != 0) | (row[here] < 0)).any()):
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
