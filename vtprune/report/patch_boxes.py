# SPDX-License-Identifier: Apache-2.0
"""Rectangles of visual tokens on the original pictures, in shares of their width and height.

Rows and columns of tokens inside a crop are known from the prefill; the rectangle that a crop shows comes from
`preprocessing`, and for the tiles of any-resolution models from `tiles`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..errors import VTPruneError
from ..models.visual_tokens import VisualTokens
from . import preprocessing
from .image_source import Source
from .preprocessing import WHOLE, Box, Fit
from .tiles import tiles_box

if TYPE_CHECKING:
    from PIL.Image import Image

_FITS = ("stretch", "crop", "pad")


class PictureError(VTPruneError, ValueError):
    """Pictures cannot be read, written, or matched with the visual tokens of a call."""


@dataclass
class View:
    """A picture or frame with the rectangles of its visual tokens; several for pictures that the model saw repeatedly.

    Attributes:
        picture: The original, RGB.
        tokens: `[n]` numbers of the visual tokens in `VisualTokens`, without newlines and the like.
        boxes: `[n, 4]` rectangle of each token in shares of the picture; a letter-box reaches beyond 0 and 1.
        name: Distinguishes the views of a picture, such as "whole" and "tiles"; "" for a single one.
    """

    picture: Image
    tokens: np.ndarray
    boxes: np.ndarray
    name: str = ""


@dataclass
class _Crop:
    """Tokens of one grid: their numbers, rows and columns."""

    tokens: np.ndarray
    row: np.ndarray
    col: np.ndarray

    def boxes(self, box: Box) -> np.ndarray:
        """Rectangles `[n, 4]` of the grid's cells, with the grid stretched over a rectangle."""
        rows, cols = int(self.row.max()) + 1, int(self.col.max()) + 1
        left, top, right, bottom = box
        x, y = (right - left) / cols, (bottom - top) / rows
        return np.stack(
            [left + self.col * x, top + self.row * y, left + (self.col + 1) * x, top + (self.row + 1) * y], 1
        )


def views(
    places: VisualTokens,
    source: Source,
    pictures: Sequence[Image],
    clips: Sequence[Sequence[Image]],
    fit: str | None = None,
) -> list[View]:
    """Maps the visual tokens of a call to its pictures.

    Args:
        places: Place of each token in its crop.
        source: Source of the call's pictures.
        pictures: The originals, RGB, in the order of the batch.
        clips: The frames of each clip.
        fit: "stretch", "crop" or "pad", if the model saw a picture in one crop; None infers it from the pixels.

    Returns:
        list[View]: Picture by picture.

    Raises:
        PictureError: The number of pictures is not that of the call, or the parts of them that the model saw cannot be
            inferred.
    """
    if fit is not None and fit not in _FITS:
        raise PictureError(f"fit is {fit!r}; expected one of {_FITS}, or None to infer it")
    out: list[View] = []
    for kind, name in enumerate(source.kinds):
        images = list(_images(places, kind))
        given: Sequence = clips if name == "video" else pictures
        if bool(images) != bool(given):
            raise PictureError(
                f"the call had {len(images)} {name} inputs and {len(given)} were given; give all of them"
            )
        if not images:
            continue
        if name == "video":
            out += _clip_views(places, source, images, clips, fit)
        elif name in source.stretched:
            _check_count(len(images), pictures)
            for tokens, picture in zip(images, pictures, strict=True):
                crop = _crops(places, tokens)[0]
                out.append(View(picture, crop.tokens, crop.boxes(WHOLE)))
        else:
            out += _picture_views(places, source, images, pictures, fit)
    return out


def _images(places: VisualTokens, kind: int) -> Iterator[np.ndarray]:
    """Yields the numbers of the tokens of each image of a kind, without the copies of beams."""
    numbers, feature = places.image.numpy(), places.feature.numpy()
    seen = set()
    for number in np.unique(numbers[places.kind.numpy() == kind]):
        tokens = np.flatnonzero(numbers == number)
        if (first := int(feature[tokens].min())) not in seen:
            seen.add(first)
            yield tokens


def _check_count(images: int, pictures: Sequence) -> None:
    if images != len(pictures):
        raise PictureError(f"the call had {images} pictures and {len(pictures)} were given; give all, in their order")


def _crops(places: VisualTokens, tokens: np.ndarray) -> list[_Crop]:
    """The grids among the tokens of one image, by crop and frame."""
    row, col = places.grid_row.numpy()[tokens], places.grid_col.numpy()[tokens]
    group = places.crop.numpy()[tokens] * (int(places.frame.max()) + 1) + places.frame.numpy()[tokens]
    here = (row >= 0) & (col >= 0)
    if not here.any():
        raise PictureError(
            f"the places of {len(tokens)} visual tokens in their picture are unknown: this model passes neither a grid "
            "nor tiles, and their number is no square; patch.last.kept still has the prompt positions that stayed"
        )
    return [_Crop(tokens[m], row[m], col[m]) for g in np.unique(group[here]) if (m := here & (group == g)).any()]


def _picture_views(
    places: VisualTokens, source: Source, images: list[np.ndarray], pictures: Sequence[Image], fit: str | None
) -> list[View]:
    crops = [_crops(places, tokens) for tokens in images]
    seen = _pixels(source, "image", sum(map(len, crops)))
    out = []
    for (first, last), picture in zip(_shares(places, images, crops, seen, pictures), pictures, strict=True):
        shown = [crop for image in crops[first:last] for crop in image]
        if source.pinpoints and source.sizes is not None and len(shown) == 2:
            side = int(shown[0].row.max()) + 1
            boxes: tuple[Box, ...] = (WHOLE, tiles_box(source, source.sizes[first].tolist(), side))
        else:
            start = sum(map(len, crops[:first]))
            pixels = None if seen is None else seen[start : start + len(shown)]
            padded = bool(source.pinpoints) and max(source.per_sample or [1]) > 1  # several images are padded
            boxes = _find(picture, len(shown), pixels, "pad" if padded and fit is None else fit).boxes
        whole = [len(boxes) > 1 and box == WHOLE for box in boxes]
        for name, chosen in (("whole", True), ("tiles", False)):
            parts = [(c, b) for c, b, w in zip(shown, boxes, whole, strict=True) if w == chosen]
            if parts:
                cells = np.concatenate([crop.boxes(box) for crop, box in parts])
                tokens = np.concatenate([crop.tokens for crop, _ in parts])
                out.append(View(picture, tokens, cells, name if any(whole) else ""))
    return out


def _shares(
    places: VisualTokens,
    images: list[np.ndarray],
    crops: list[list[_Crop]],
    seen: np.ndarray | None,
    pictures: Sequence[Image],
) -> list[tuple[int, int]]:
    """For each picture, the range `(first, end)` of the images that show it; a model may take tiles as images."""
    count, wanted = len(images), len(pictures)
    if wanted == count:
        return [(i, i + 1) for i in range(count)]
    samples = places.sample.numpy()[[tokens[0] for tokens in images]]
    starts = [0, *(np.flatnonzero(np.diff(samples)) + 1).tolist(), count]
    if wanted == len(starts) - 1:
        return list(zip(starts, starts[1:], strict=False))
    if wanted > count or seen is None or len(seen) != count:
        raise PictureError(
            f"the call had {count} pictures or tiles in {len(starts) - 1} prompts, and {wanted} pictures were given; "
            "pass all of them, in their order, right after the call"
        )
    return _best_split(seen, pictures, set(starts))


def _best_split(seen: np.ndarray, pictures: Sequence[Image], starts: set[int]) -> list[tuple[int, int]]:
    """The split of tiles into pictures that best explains the pixels; a picture does not cross two prompts."""
    count = len(seen)
    small = [_thumbnail(picture) for picture in pictures]
    best: dict[int, tuple[float, list[tuple[int, int]]]] = {0: (0.0, [])}
    for picture in small:
        after: dict[int, tuple[float, list[tuple[int, int]]]] = {}
        for first, (value, parts) in best.items():
            for last in range(first + 1, count + 1):
                fits = preprocessing.possible_fits(last - first, picture.width / picture.height, _aspect(seen))
                share = preprocessing.best(picture, fits, seen[first:last])[1] * (last - first)
                if last not in after or value + share > after[last][0] + 1e-9:
                    after[last] = value + share, [*parts, (first, last)]
                if last in starts:
                    break
        best = after
    if count not in best or not preprocessing.enough(best[count][0] / count):
        raise PictureError(
            f"{len(pictures)} pictures do not match the {count} tiles that the model saw; pass the pictures of this "
            "call, in their order"
        )
    return best[count][1]


def _clip_views(
    places: VisualTokens, source: Source, images: list[np.ndarray], clips: Sequence[Sequence[Image]], fit: str | None
) -> list[View]:
    _check_count(len(images), clips)
    crops = [_crops(places, tokens) for tokens in images]
    seen = None if "video" in source.stretched else _pixels(source, "video", sum(map(len, crops)))
    out, start = [], 0
    for number, (steps, frames) in enumerate(zip(crops, clips, strict=True)):
        if len(frames) < len(steps):
            raise PictureError(
                f"clip {number} has {len(frames)} frames, the model has tokens of {len(steps)}; pass all frames that "
                "the model was given"
            )
        # A model may merge or sample the given frames: each step is shown by the frame in its middle.
        shown = [frames[int((step + 0.5) * len(frames) / len(steps))] for step in range(len(steps))]
        box = WHOLE
        if seen is not None and len(frames) == len(steps):
            middle = len(steps) // 2
            box = _find(shown[middle], 1, seen[start + middle : start + middle + 1], fit).boxes[0]
        start += len(steps)
        for step, (crop, frame) in enumerate(zip(steps, shown, strict=True)):
            out.append(View(frame, crop.tokens, crop.boxes(box), f"frame {step}"))
    return out


def _find(picture: Image, crops: int, seen: np.ndarray | None, fit: str | None) -> Fit:
    """Infers how a picture was cut into a number of crops."""
    aspect = picture.width / picture.height
    fits = preprocessing.possible_fits(crops, aspect, 1.0 if seen is None else _aspect(seen))
    if crops == 1 and fit is not None:
        return next(possible for possible in fits if possible.name == fit)
    if seen is not None:
        found, share = preprocessing.best(_thumbnail(picture), fits, seen)
        if preprocessing.enough(share):
            return found
        raise PictureError(
            f"the picture does not match the {crops} crops that the model saw: the best fit, {found.name}, explains "
            f"{100 * share:.0f} % of them; pass the pictures of this call, in their order"
            + (f", or fit= as one of {_FITS}" if crops == 1 else "")
        )
    if crops > 1 or abs(math.log(aspect)) < 0.01:
        return fits[0]
    raise PictureError(
        f"the model saw a picture of {picture.width} x {picture.height} pixels in one square crop, whose pixels are no "
        f"longer available to infer how it was cut; call this right after the prefill, or pass fit= as one of {_FITS}"
    )


def _pixels(source: Source, kind: str, crops: int) -> np.ndarray | None:
    """Pixels `[crops, 3, H, W]` that the model got; None if they are gone or their number of crops differs."""
    found = source.crops(kind)
    if found is None:
        return None
    if found.dim() == 5:  # padded to the largest number of tiles or pictures in the batch
        found = found.flatten(0, 1)
        found = found if len(found) == crops else found[found.flatten(1).any(1)]
    return found.numpy() if len(found) == crops else None


def _thumbnail(picture: Image) -> Image:
    """Copy of at most 512 pixels a side, for comparisons."""
    small = picture.copy()
    small.thumbnail((512, 512))
    return small


def _aspect(seen: np.ndarray) -> float:
    return seen.shape[-1] / seen.shape[-2]
