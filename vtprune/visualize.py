# SPDX-License-Identifier: Apache-2.0
"""Pictures that show which patches were dropped. Pure functions from pictures and masks to pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .pictures_places import PictureError

if TYPE_CHECKING:
    from PIL.Image import Image

    from .report import Pruning

# Weights of red, green and blue in what the eye takes for brightness (ITU-R BT.601).
LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)


def keep_grid(row: Any, col: Any, kept: Any, shape: tuple[int, int] | None = None) -> np.ndarray:
    """Lays a flat keep mask out on the grid of its picture.

    Args:
        row: `[N]` integers, row of each visual token; negative for tokens without a place, which are left out.
        col: `[N]` integers, column of each.
        kept: `[N]` bool, True for tokens that stayed.
        shape: Rows and columns of the grid, by default the smallest that holds all tokens.

    Returns:
        np.ndarray: `[rows, cols]` bool. Cells without a token count as kept: nothing was dropped there.

    Raises:
        PictureError: The lengths differ, no token has a place, or a token lies outside `shape`.
    """
    row, col, kept = (np.asarray(part).reshape(-1) for part in (row, col, kept))
    if not len(row) == len(col) == len(kept):
        raise PictureError(
            f"row, col and kept have {len(row)}, {len(col)} and {len(kept)} entries; expected as many each"
        )
    placed = (row >= 0) & (col >= 0)
    if not placed.any():
        raise PictureError("no visual token has a place in a grid; expected rows and columns of at least 0")
    row, col, kept = row[placed], col[placed], kept[placed].astype(bool)
    rows, cols = shape or (int(row.max()) + 1, int(col.max()) + 1)
    if row.max() >= rows or col.max() >= cols:
        raise PictureError(f"a token lies at row {row.max()}, column {col.max()}, outside of the {rows} x {cols} grid")
    grid = np.ones((rows, cols), dtype=bool)
    grid[row, col] = kept
    return grid


def dim_dropped(image: Image, keep: Any, *, strength: float = 0.65) -> Image:
    """The picture with dropped patches dark and grey, in the picture's own pixels.

    The grid is stretched over the whole picture, whatever its size: a pixel belongs to the cell that holds its centre.

    Args:
        image: Picture of any size and mode.
        keep: `[rows, cols]` bool, True for patches that stayed; or several such masks, one per stage in the order of
            the cuts: what went first is darkest.
        strength: How much of colour and light a dropped patch loses, in [0, 1]; 0 leaves the picture as it is.

    Returns:
        Image: A new RGB picture of the same size.

    Raises:
        PictureError: A mask is not two-dimensional, is empty, or has another shape than the first one.
    """
    from PIL import Image as images

    loss = _loss(keep) * np.float32(min(max(strength, 0.0), 1.0))  # [rows, cols]
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)  # [height, width, 3]
    height, width = pixels.shape[:2]
    down = ((np.arange(height) + 0.5) * loss.shape[0] / height).astype(int)  # [height] row of each line of pixels
    right = ((np.arange(width) + 0.5) * loss.shape[1] / width).astype(int)  # [width]
    share = loss[down[:, None], right[None, :], None]  # [height, width, 1]
    grey = (pixels @ LUMA)[..., None]  # [height, width, 1]
    dimmed = (pixels * (1 - share) + grey * share) * (1 - share)
    return images.fromarray(np.rint(dimmed).clip(0, 255).astype(np.uint8))


def side_by_side(pictures: Sequence[Image], captions: Sequence[str] = (), *, height: int = 384, gap: int = 12) -> Image:
    """Pictures in a row on white, scaled to one height, each under its caption.

    Args:
        pictures: At least one.
        captions: A line for each picture, or none at all; a line that is too long for its picture is broken.
        height: Of the pictures, in pixels.
        gap: White space around them, in pixels.

    Returns:
        Image: RGB.

    Raises:
        PictureError: No picture, or not as many captions as pictures.
    """
    from PIL import Image as images
    from PIL import ImageDraw, ImageFont

    if not pictures or (captions and len(captions) != len(pictures)):
        raise PictureError(f"got {len(pictures)} pictures and {len(captions)} captions; expected as many of each")
    scaled = [p.convert("RGB").resize((max(1, round(p.width * height / p.height)), height)) for p in pictures]
    font = ImageFont.load_default(size=15)
    texts = [_broken(text, picture.width, font) for text, picture in zip(captions, scaled, strict=False)]
    lines = max((text.count("\n") + 1 for text in texts), default=0)
    top = gap + 20 * lines
    sheet = images.new("RGB", (sum(p.width for p in scaled) + gap * (len(scaled) + 1), top + height + gap), "white")
    draw, left = ImageDraw.Draw(sheet), gap
    for index, picture in enumerate(scaled):
        sheet.paste(picture, (left, top))
        if texts:
            draw.multiline_text((left, gap // 2), texts[index], fill="black", font=font)
        left += picture.width + gap
    return sheet


def before_and_after(image: Image, pruning: Pruning, answers: tuple[str, str]) -> Image:
    """The picture as it is beside the picture with its dropped patches dimmed, for a prompt with one picture.

    Where a model looks at the picture twice, as a whole and in tiles, there is a panel for each. With several cuts,
    what went first is darkest.

    Args:
        image: The picture.
        pruning: What `Patch.last` says of the call.
        answers: Without and with pruning.

    Raises:
        PictureError: The places of the visual tokens are not known.
    """
    panels, captions = [image], [f"all {len(pruning.places)} visual tokens: {answers[0]}"]
    for panel, caption in pruning.show(image).panels():
        panels.append(panel)
        captions.append(f"{caption}: {answers[1]}")
    return side_by_side(panels, captions)


def _loss(keep: Any) -> np.ndarray:
    """`[rows, cols]` float32 in [0, 1]: 0 where the patch stayed, 1 where the first cut took it, less for later."""
    grids = [np.asarray(part) for part in keep] if len(keep) and np.ndim(keep[0]) == 2 else [np.asarray(keep)]
    for grid in grids:
        if grid.ndim != 2 or not grid.size or grid.shape != grids[0].shape:
            raise PictureError(f"a keep mask has shape {grid.shape}; expected [rows, cols], the same for every stage")
    loss = np.zeros(grids[0].shape, dtype=np.float32)
    for stage in range(len(grids) - 1, -1, -1):  # backwards, so that the first cut that took a patch has the last word
        loss[~grids[stage].astype(bool)] = 1 - 0.5 * stage / len(grids)
    return loss


def _broken(text: str, width: int, font: Any) -> str:
    """The text in lines of at most `width` pixels, broken between words."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)
