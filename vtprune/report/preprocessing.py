# SPDX-License-Identifier: Apache-2.0
"""How a picture was cut into the square crops that a model saw.

A model is given crops, not the picture: stretched, cut out of the middle, letter-boxed, or a grid of tiles with the
whole picture before or after them. Shapes alone do not tell these apart. So every way that processors know is tried on
the original, and the one that explains the pixels which the model was given is taken. Rectangles are `(left, top,
right, bottom)` in shares of the picture's width and height; a letter-box reaches beyond 0 and 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

Box = tuple[float, float, float, float]
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
_SIZE = 32  # crops are compared at this many pixels a side
# A right guess explains nearly all; resampling filters differ. A wrong one rarely explains half.
_ENOUGH = 0.5
# What counts at least as the variance to explain, of that of all pixels: stripes and noise leave little when averaged,
# and that little depends on the filter.
_FINE = 0.05


@dataclass(frozen=True)
class Fit:
    """One way to cut a picture into crops.

    Attributes:
        name: "stretch", "crop", "pad" or, for several crops, the grid.
        boxes: A rectangle for each crop.
    """

    name: str
    boxes: tuple[Box, ...]


def ways(crops: int, aspect: float, crop_aspect: float = 1.0) -> list[Fit]:
    """The ways to cut a picture into some crops, the more usual first.

    Args:
        crops: How many.
        aspect: Width of the picture by its height.
        crop_aspect: The same of a crop.
    """
    if crops == 1:
        return [
            Fit("stretch", (WHOLE,)),
            Fit("crop", (_central(aspect, crop_aspect, 1.0),)),
            Fit("pad", (_around(aspect, crop_aspect, 0.5),)),
            Fit("crop", (_central(aspect, crop_aspect, 0.875),)),  # resized to 256, cut to 224
            Fit("pad", (_around(aspect, crop_aspect, 0.0),)),
        ]
    found = []
    for whole in ("last", "first", "none"):
        tiles = crops - (whole != "none")
        if tiles < 2:
            continue
        shapes = [(tiles // cols, cols) for cols in range(1, tiles + 1) if tiles % cols == 0]
        shapes.sort(key=lambda shape: abs(math.log(aspect / (crop_aspect * shape[1] / shape[0]))))
        for rows, cols in shapes:
            grid = [
                (col / cols, row / rows, (col + 1) / cols, (row + 1) / rows)
                for row in range(rows)
                for col in range(cols)
            ]
            boxes = {"last": [*grid, WHOLE], "first": [WHOLE, *grid], "none": grid}[whole]
            found.append(Fit(f"{rows} x {cols} tiles, whole {whole}", tuple(boxes)))
    return found


def _central(aspect: float, crop_aspect: float, part: float) -> Box:
    """What is left when a picture is resized to cover a crop and the middle is cut out."""
    across, down = min(1.0, crop_aspect / aspect) * part, min(1.0, aspect / crop_aspect) * part
    return (1 - across) / 2, (1 - down) / 2, (1 + across) / 2, (1 + down) / 2


def _around(aspect: float, crop_aspect: float, before: float) -> Box:
    """The rectangle of a crop's shape around a picture, with this share of the padding before it."""
    across, down = max(1.0, crop_aspect / aspect), max(1.0, aspect / crop_aspect)
    left, top = -(across - 1) * before, -(down - 1) * before
    return left, top, left + across, top + down


def explained(picture: Image, fit: Fit, crops: np.ndarray) -> float:
    """How much of what the model saw a fit explains, in [0, 1]; 1 where there is nothing to explain.

    Args:
        picture: The original, RGB.
        fit: A way to cut it.
        crops: `[n, 3, H, W]` what the model saw, in any normalization.
    """
    seen = np.stack([_small(crop) for crop in crops])  # [n, S, S, 3]
    cut = [_cut(picture, box) for box in fit.boxes]
    guess, inside = np.stack([c[0] for c in cut]), np.stack([c[1] for c in cut]).reshape(-1)  # [n, S, S, 3], [n S S]
    left = total = 0.0
    for channel in range(3):  # the best brightness and contrast inside, and one color for the padding
        y, x = seen[..., channel].reshape(-1), guess[..., channel].reshape(-1)
        basis = np.stack([x * inside, inside, 1.0 - inside], 1)
        rest = y - basis @ np.linalg.lstsq(basis, y, rcond=None)[0]
        coarse, fine = float(((y - y.mean()) ** 2).sum()), float(crops[:, channel].var()) * len(y)
        left, total = left + float(rest @ rest), total + max(coarse, _FINE * fine)
    return 1.0 if total < 1e-9 * len(inside) else 1 - left / total


def best(picture: Image, fits: Sequence[Fit], crops: np.ndarray) -> tuple[Fit, float]:
    """The fit that explains most, the first of equals, and how much it explains."""
    shares = [explained(picture, fit, crops) for fit in fits]
    first = next(i for i, share in enumerate(shares) if share >= max(shares) - 1e-6)
    return fits[first], shares[first]


def enough(share: float) -> bool:
    """Whether a fit explains so much that it is taken for the right one."""
    return share >= _ENOUGH


def _small(crop: np.ndarray) -> np.ndarray:
    """`[3, H, W]` -> `[S, S, 3]` float64, averaged over areas."""
    from PIL import Image as images

    planes = [images.fromarray(np.ascontiguousarray(plane, dtype=np.float32)) for plane in crop]
    small = [np.asarray(p.resize((_SIZE, _SIZE), images.Resampling.BOX), dtype=np.float64) for p in planes]
    return np.stack(small, -1)


def _cut(picture: Image, box: Box) -> tuple[np.ndarray, np.ndarray]:
    """A rectangle of a picture as `[S, S, 3]`, and `[S, S]` 1 where it lies inside of the picture."""
    from PIL import Image as images

    width, height = picture.size
    center = (np.arange(_SIZE) + 0.5) / _SIZE
    x, y = box[0] + center * (box[2] - box[0]), box[1] + center * (box[3] - box[1])
    inside = ((y >= 0) & (y <= 1))[:, None] & ((x >= 0) & (x <= 1))[None, :]
    # Where the rectangle and the picture meet, in cells of the result; the rest stays black.
    part = [max(box[0], 0.0), max(box[1], 0.0), min(box[2], 1.0), min(box[3], 1.0)]
    target = images.new("RGB", (_SIZE, _SIZE))
    cols, rows = np.flatnonzero(inside.any(0)), np.flatnonzero(inside.any(1))
    if len(cols) and len(rows):
        source = (part[0] * width, part[1] * height, part[2] * width, part[3] * height)
        piece = picture.resize((len(cols), len(rows)), images.Resampling.BOX, box=source)
        target.paste(piece, (int(cols[0]), int(rows[0])))
    return np.asarray(target, dtype=np.float64), inside.astype(np.float64)
