# SPDX-License-Identifier: Apache-2.0
"""Infers how a processor cut a picture into the square crops that a model saw.

Crops are stretched, cut out of the middle, letter-boxed, or a grid of tiles with the whole picture before or after
them, which shapes alone do not determine. So all variants are applied to the original, and the one that best explains
the model's pixels is taken. Rectangles are `(left, top, right, bottom)` in shares of the picture's width and height; a
letter-box reaches beyond 0 and 1.
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
# The right fit explains nearly all variance, but for differences of resampling filters; a wrong one rarely half of it.
_ENOUGH = 0.5
# Lower bound of the variance to explain, as a share of that of all pixels: of stripes and noise, little is left after
# averaging, and that depends on the filter.
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


def possible_fits(crops: int, aspect: float, crop_aspect: float = 1.0) -> list[Fit]:
    """The ways in which processors cut a picture into a number of crops, more common ones first.

    Args:
        crops: Number of crops.
        aspect: Aspect ratio of the picture, width by height.
        crop_aspect: Aspect ratio of a crop.
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
    """Rectangle of a center crop: the picture is resized to cover the crop, and this part of its middle is kept."""
    across, down = min(1.0, crop_aspect / aspect) * part, min(1.0, aspect / crop_aspect) * part
    return (1 - across) / 2, (1 - down) / 2, (1 + across) / 2, (1 + down) / 2


def _around(aspect: float, crop_aspect: float, before: float) -> Box:
    """Rectangle of a crop that contains the whole picture, with the share `before` of the padding left or above it."""
    across, down = max(1.0, crop_aspect / aspect), max(1.0, aspect / crop_aspect)
    left, top = -(across - 1) * before, -(down - 1) * before
    return left, top, left + across, top + down


def explained(picture: Image, fit: Fit, crops: np.ndarray) -> float:
    """Share of the variance of the model's pixels that a fit explains, in [0, 1]; 1 if there is no variance.

    Args:
        picture: The original, RGB.
        fit: A way to cut it.
        crops: `[n, 3, H, W]` pixels that the model got, in any normalization.
    """
    seen = np.stack([_small(crop) for crop in crops])  # [n, S, S, 3]
    cut = [_cut(picture, box) for box in fit.boxes]
    guess, inside = np.stack([c[0] for c in cut]), np.stack([c[1] for c in cut]).reshape(-1)  # [n, S, S, 3], [n S S]
    left = total = 0.0
    for channel in range(3):  # least squares over brightness and contrast inside, and the color of the padding
        y, x = seen[..., channel].reshape(-1), guess[..., channel].reshape(-1)
        basis = np.stack([x * inside, inside, 1.0 - inside], 1)
        rest = y - basis @ np.linalg.lstsq(basis, y, rcond=None)[0]
        coarse, fine = float(((y - y.mean()) ** 2).sum()), float(crops[:, channel].var()) * len(y)
        left, total = left + float(rest @ rest), total + max(coarse, _FINE * fine)
    return 1.0 if total < 1e-9 * len(inside) else 1 - left / total


def best(picture: Image, fits: Sequence[Fit], crops: np.ndarray) -> tuple[Fit, float]:
    """The fit that explains the largest share, the first of equals, and this share."""
    shares = [explained(picture, fit, crops) for fit in fits]
    first = next(i for i, share in enumerate(shares) if share >= max(shares) - 1e-6)
    return fits[first], shares[first]


def enough(share: float) -> bool:
    """Whether a fit that explains this share is accepted as the right one."""
    return share >= _ENOUGH


def _small(crop: np.ndarray) -> np.ndarray:
    """Scales `[3, H, W]` down to `[S, S, 3]` float64, averaging over areas."""
    from PIL import Image as images

    planes = [images.fromarray(np.ascontiguousarray(plane, dtype=np.float32)) for plane in crop]
    small = [np.asarray(p.resize((_SIZE, _SIZE), images.Resampling.BOX), dtype=np.float64) for p in planes]
    return np.stack(small, -1)


def _cut(picture: Image, box: Box) -> tuple[np.ndarray, np.ndarray]:
    """A rectangle of a picture as `[S, S, 3]`, and `[S, S]` with 1 inside the picture, else 0."""
    from PIL import Image as images

    width, height = picture.size
    center = (np.arange(_SIZE) + 0.5) / _SIZE
    x, y = box[0] + center * (box[2] - box[0]), box[1] + center * (box[3] - box[1])
    inside = ((y >= 0) & (y <= 1))[:, None] & ((x >= 0) & (x <= 1))[None, :]
    # The intersection of rectangle and picture; the rest stays black.
    part = [max(box[0], 0.0), max(box[1], 0.0), min(box[2], 1.0), min(box[3], 1.0)]
    target = images.new("RGB", (_SIZE, _SIZE))
    cols, rows = np.flatnonzero(inside.any(0)), np.flatnonzero(inside.any(1))
    if len(cols) and len(rows):
        source = (part[0] * width, part[1] * height, part[2] * width, part[3] * height)
        piece = picture.resize((len(cols), len(rows)), images.Resampling.BOX, box=source)
        target.paste(piece, (int(cols[0]), int(rows[0])))
    return np.asarray(target, dtype=np.float64), inside.astype(np.float64)
