# SPDX-License-Identifier: Apache-2.0
"""Where visual tokens lie on the original pictures, in shares of their width and height.

Rows and columns of tokens inside a crop are known from the prefill; what rectangle of the original a crop shows comes
from `pictures_fit`, and for the tiles of any-resolution models from `pictures_tiles`.
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
    """Pictures and visual tokens do not go together, or a mask does not describe a grid of patches."""


@dataclass
class View:
    """A picture, or a frame of a clip, as the model looked at it once.

    Attributes:
        picture: The original, RGB.
        tokens: `[n]` numbers of the visual tokens in `VisualTokens`; newlines and the like are left out.
        boxes: `[n, 4]` rectangle of each token in shares of the picture; a letter-box reaches beyond 0 and 1.
        name: What to call it beside others, "" for the only one of its picture.
    """

    picture: Image
    tokens: np.ndarray
    boxes: np.ndarray
    name: str = ""


@dataclass
class _Crop:
    """Tokens that lie in one grid, by numbers, rows and columns."""

    tokens: np.ndarray
    row: np.ndarray
    col: np.ndarray

    def boxes(self, box: Box) -> np.ndarray:
        """`[n, 4]` cells of the grid stretched over a rectangle."""
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
    """Lays the visual tokens of a call over its pictures.

    Args:
        places: Where each token lies in its crop.
        source: What the call remembers of its pictures.
        pictures: The originals, RGB, in the order of the batch.
        clips: The frames of each clip.
        fit: "stretch", "crop" or "pad" where one crop shows a picture and it cannot be told how; None to find out.

    Returns:
        list[View]: Picture by picture.

    Raises:
        PictureError: There are more or fewer pictures than the call had, or it cannot be told which parts of them the
            model saw.
    """
    if fit is not None and fit not in _FITS:
        raise PictureError(f"fit is {fit!r}; expected one of {_FITS}, or None to find out")
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
                out.append(_view(places, tokens, picture, WHOLE))
        else:
            out += _picture_views(places, source, images, pictures, fit)
    return out


def _images(places: VisualTokens, kind: int) -> Iterator[np.ndarray]:
    """Numbers of the tokens of each image of a kind; of pictures that beams show again only the first copy."""
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
            f"{len(tokens)} visual tokens of a picture have no known place in it: this model tells neither a grid nor "
            "tiles, and their number is no square; patch.last.kept still says which prompt columns stayed"
        )
    return [_Crop(tokens[m], row[m], col[m]) for g in np.unique(group[here]) if (m := here & (group == g)).any()]


def _view(places: VisualTokens, tokens: np.ndarray, picture: Image, box: Box, name: str = "") -> View:
    crop = _crops(places, tokens)[0]
    return View(picture, crop.tokens, crop.boxes(box), name)


def _picture_views(
    places: VisualTokens, source: Source, images: list[np.ndarray], pictures: Sequence[Image], fit: str | None
) -> list[View]:
    crops = [_crops(places, tokens) for tokens in images]
    seen = _pixels(source, "image", sum(map(len, crops)))
    out = []
    for (first, last), picture in zip(_shares(places, images, crops, seen, pictures), pictures, strict=True):
        mine = [crop for image in crops[first:last] for crop in image]
        if source.pinpoints and source.sizes is not None and len(mine) == 2:
            side = int(mine[0].row.max()) + 1
            boxes: tuple[Box, ...] = (WHOLE, tiles_box(source, source.sizes[first].tolist(), side))
        else:
            start = sum(map(len, crops[:first]))
            pixels = None if seen is None else seen[start : start + len(mine)]
            squared = bool(source.pinpoints) and max(source.per_sample or [1]) > 1  # several images are padded
            boxes = _find(picture, len(mine), pixels, "pad" if squared and fit is None else fit).boxes
        whole = [len(boxes) > 1 and box == WHOLE for box in boxes]
        for name, chosen in (("whole", True), ("tiles", False)):
            parts = [(c, b) for c, b, w in zip(mine, boxes, whole, strict=True) if w == chosen]
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
    """For each picture, the first image that shows it and the one after the last: tiles may come as images."""
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
            "give all, in their order, right after the call"
        )
    return _best_split(seen, pictures, set(starts))


def _best_split(seen: np.ndarray, pictures: Sequence[Image], starts: set[int]) -> list[tuple[int, int]]:
    """Which tiles show which picture: the split that explains the pixels best; no picture goes on into a new prompt."""
    count = len(seen)
    small = [_thumbnail(picture) for picture in pictures]
    best: dict[int, tuple[float, list[tuple[int, int]]]] = {0: (0.0, [])}
    for picture in small:
        after: dict[int, tuple[float, list[tuple[int, int]]]] = {}
        for first, (value, parts) in best.items():
            for last in range(first + 1, count + 1):
                fits = preprocessing.ways(last - first, picture.width / picture.height, _aspect(seen))
                if fits:
                    share = preprocessing.best(picture, fits, seen[first:last])[1] * (last - first)
                    if last not in after or value + share > after[last][0] + 1e-9:
                        after[last] = value + share, [*parts, (first, last)]
                if last in starts:
                    break
        best = after
    if count not in best or not preprocessing.enough(best[count][0] / count):
        raise PictureError(f"{len(pictures)} pictures do not look like what the model saw in {count} tiles")
    return best[count][1]


def _clip_views(
    places: VisualTokens, source: Source, images: list[np.ndarray], clips: Sequence[Sequence[Image]], fit: str | None
) -> list[View]:
    _check_count(len(images), clips)
    crops = [_crops(places, tokens) for tokens in images]
    seen = None if "video" in source.stretched else _pixels(source, "video", sum(map(len, crops)))
    out, start = [], 0
    for mine, frames in zip(crops, clips, strict=True):
        if not frames:
            raise PictureError("a clip has no frames")
        # A model may see fewer frames than it was given: each step shows the frame in its middle.
        shown = [frames[int((step + 0.5) * len(frames) / len(mine))] for step in range(len(mine))]
        box = WHOLE
        if seen is not None and len(frames) == len(mine):
            middle = len(mine) // 2
            box = _find(shown[middle], 1, seen[start + middle : start + middle + 1], fit).boxes[0]
        start += len(mine)
        for step, (crop, frame) in enumerate(zip(mine, shown, strict=True)):
            out.append(View(frame, crop.tokens, crop.boxes(box), f"frame {step}"))
    return out


def _find(picture: Image, crops: int, seen: np.ndarray | None, fit: str | None) -> Fit:
    """How a picture was cut into some crops."""
    aspect = picture.width / picture.height
    fits = preprocessing.ways(crops, aspect, 1.0 if seen is None else _aspect(seen))
    if not fits:
        raise PictureError(f"no way is known to cut a picture into {crops} crops")
    if crops == 1 and fit is not None:
        return next(way for way in fits if way.name == fit)
    if seen is not None:
        found, share = preprocessing.best(_thumbnail(picture), fits, seen)
        if preprocessing.enough(share):
            return found
        raise PictureError(
            f"the picture does not look like what the model saw in {crops} crops: the nearest, {found.name}, explains "
            f"{100 * share:.0f} % of it; give the pictures of this very call, in their order"
            + (f", or say fit= one of {_FITS}" if crops == 1 else "")
        )
    if crops > 1 or abs(math.log(aspect)) < 0.01:
        return fits[0]
    raise PictureError(
        f"a picture of {picture.width} x {picture.height} pixels was shown to the model in one square crop, and its "
        f"pixels are gone, so it cannot be told how it was cut; ask right after the call, or say fit= one of {_FITS}"
    )


def _pixels(source: Source, kind: str, crops: int) -> np.ndarray | None:
    """`[crops, 3, H, W]` what the model saw; None where the pixels are gone or are not that many crops."""
    found = source.crops(kind)
    if found is None:
        return None
    if found.dim() == 5:  # padded to the largest number of tiles or pictures in the batch
        found = found.flatten(0, 1)
        found = found if len(found) == crops else found[found.flatten(1).any(1)]
    return found.numpy() if len(found) == crops else None


def _thumbnail(picture: Image) -> Image:
    """At most 512 pixels a side: enough to compare."""
    small = picture.copy()
    small.thumbnail((512, 512))
    return small


def _aspect(seen: np.ndarray) -> float:
    return seen.shape[-1] / seen.shape[-2]
