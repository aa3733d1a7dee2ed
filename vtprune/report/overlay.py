# SPDX-License-Identifier: Apache-2.0
"""Pictures of a prefill: dropped patches stage by stage, and the method's scores."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import one_line
from . import draw
from .patch_boxes import PictureError, View, views

if TYPE_CHECKING:
    from PIL.Image import Image

    from .record import PruningRecord

_PIXELS_PER_TOKEN = 24  # along a side of a gray placeholder


@dataclass(frozen=True)
class Pictures:
    """The pictures of one call with its visual tokens, returned by `Pruning.show`; notebooks display it.

    Attributes:
        pruning: The record of the call.
        views: The pictures as the model saw them, with the rectangle of every visual token.
        names: A caption for each picture, or none.
        mode: "dropped", "stages" or "heat".
        stage: The cut whose scores are shown.
    """

    pruning: PruningRecord
    views: list[View]
    names: tuple[str, ...] = ()
    mode: str = "dropped"
    stage: int = 0

    @classmethod
    def of(
        cls,
        pruning: PruningRecord,
        images: Any,
        videos: Sequence[Any] | None,
        fit: str | None,
        names: Sequence[str] | None,
    ) -> Pictures:
        """Builds the pictures of `Pruning.show`; see there."""
        if images is None and videos is None:
            return cls(pruning, _placeholders(pruning), tuple(names or ()))
        pictures = [_picture(image) for image in _several(images)]
        clips = [[_picture(frame) for frame in clip] for clip in videos or ()]
        found = _drawable(views(pruning.places, pruning.source, pictures, clips, fit))
        return cls(pruning, found, tuple(names or ()))

    def by_stage(self) -> Pictures:
        """One row of pictures for every cut."""
        return replace(self, mode="stages")

    def heatmap(self, stage: int | None = None) -> Pictures:
        """Heat maps of the scores at a cut, by default the first with scores; see `Pruning.heatmap`."""
        scored = [i for i, scores in enumerate(self.pruning.scores) if scores is not None]
        if stage is None and scored:
            stage = scored[0]
        if stage is None or stage not in scored:
            which = "any cut" if stage is None else f"cut {stage}"
            raise PictureError(
                f"{self.pruning.method} gave no scores at {which} of this call; cuts with scores: {scored or 'none'}; "
                "show() needs none, and methods that score every token, such as iwp, have a heat map"
            )
        return replace(self, mode="heat", stage=stage)

    def panels(self) -> list[tuple[Image, str]]:
        """Every picture with its caption."""
        return [panel for row in self._rows() for panel in row]

    def strips(self) -> list[tuple[Image, str]]:
        """Strip of each clip with its caption, see `draw.strip`: how the budget was spread over its frames."""
        places = self.pruning.places
        kept = np.zeros(len(places), dtype=bool)
        kept[self.pruning.kept_flat[-1].numpy() if self.pruning.kept_flat else np.arange(len(places))] = True
        clips: dict[int, list[View]] = {}
        for view in self.views:
            clips.setdefault(int(places.image[view.tokens[0]]), []).append(view)
        out = []
        for number, clip in enumerate(clips.values()):
            frames = [int(places.frame[view.tokens[0]]) for view in clip]
            if len(set(frames)) < 2:
                continue
            counts, totals = [int(kept[view.tokens].sum()) for view in clip], [len(view.tokens) for view in clip]
            most = int(np.argmax(counts))
            name = f"clip {number}: " if len(clips) > 1 else ""
            caption = (
                f"{name}{sum(counts)} of {sum(totals)} kept in {len(clip)} frames, {min(counts)} to {max(counts)} "
                f"a frame, most in frame {frames[most]}"
            )
            out.append((draw.strip([view.picture for view in clip], counts, totals), caption))
        return out

    @property
    def image(self) -> Image:
        """All panels on one sheet, below the strips of clips."""
        sheet = draw.sheet(self._rows())
        if self.mode != "dropped":
            return sheet
        strips = [draw.side_by_side([picture], [caption], height=picture.height) for picture, caption in self.strips()]
        return draw.stack([*strips, sheet]) if strips else sheet

    def save(self, path: Any) -> None:
        """Writes the sheet to a picture file; its suffix determines the format.

        Raises:
            PictureError: The file cannot be written.
        """
        try:
            self.image.save(Path(path).expanduser())
        except (OSError, ValueError) as error:
            raise PictureError(
                f"cannot write a picture to {path}: {one_line(error)}; expected a name such as kept.png in a folder "
                "that exists"
            ) from error

    def __repr__(self) -> str:
        return f"Pictures({len(self.views)} of {self.pruning!r}, mode={self.mode!r})"

    def _repr_png_(self) -> bytes:
        return draw.png(self.image)

    def _repr_html_(self) -> str:
        data = base64.b64encode(self._repr_png_()).decode()
        return f'<img alt="visual tokens, what was dropped is dark" src="data:image/png;base64,{data}">'

    def _rows(self) -> list[list[tuple[Image, str]]]:
        if self.mode == "heat":
            return [self._heat()]
        if self.mode == "stages":
            cuts = range(len(self.pruning.kept_flat)) if self.pruning.kept_flat else [-1]
            return [
                self._dropped(cut, f"before layer {self.pruning.stages[cut][0]}: " if cut >= 0 else "") for cut in cuts
            ]
        return [self._dropped(None, "")]

    def _dropped(self, only: int | None, prefix: str) -> list[tuple[Image, str]]:
        """Panels after one cut, or (with `only=None`) after all, where tokens that were dropped earlier are darker."""
        total, kept = len(self.pruning.places), [k.numpy() for k in self.pruning.kept_flat]
        loss = np.zeros(total, dtype=np.float32)
        for cut in range(len(kept) - 1, -1, -1) if only is None else [only] if only >= 0 else []:
            dropped = ~np.isin(np.arange(total), kept[cut])
            loss[dropped] = 1 - 0.5 * cut / len(kept) if only is None else 1
        out = []
        for number, view in enumerate(self.views):
            shown = loss[view.tokens]
            caption = f"{prefix}{int((shown == 0).sum())} of {len(shown)} kept"
            out.append((draw.dim(view.picture, view.boxes, shown), self._caption(number, caption)))
        return out

    def _heat(self) -> list[tuple[Image, str]]:
        pruning, values = self.pruning, np.full(len(self.pruning.places), np.nan, dtype=np.float32)
        alive, scores = pruning.alive(self.stage).numpy(), pruning.scores[self.stage]
        assert scores is not None
        sample = pruning.places.sample.numpy()[alive]
        for one in np.unique(sample):
            here = np.flatnonzero(sample == one)
            order = np.argsort(np.argsort(scores.numpy()[here], kind="stable"), kind="stable")
            values[alive[here]] = order / max(len(here) - 1, 1)
        caption = f"scores of {pruning.method} before layer {pruning.stages[self.stage][0]}"
        return [
            (draw.heat(v.picture, v.boxes, values[v.tokens]), self._caption(i, caption))
            for i, v in enumerate(self.views)
        ]

    def _caption(self, number: int, text: str) -> str:
        pictures = list(dict.fromkeys(id(view.picture) for view in self.views))
        which, view = pictures.index(id(self.views[number].picture)), self.views[number]
        parts = [self.names[which] if which < len(self.names) else "", view.name]
        name = ", ".join(part for part in parts if part)
        return f"{name}: {text}" if name else text


def before_and_after(image: Image, pictures: Pictures, answers: tuple[str, str]) -> Image:
    """The original picture beside the picture with dropped patches dimmed, for a prompt with one picture.

    Models that see the picture twice, as a whole and in tiles, get a panel for each. With several cuts, tokens that
    were dropped earlier are darker.

    Args:
        image: The picture.
        pictures: Result of `patch.last.show(image)`.
        answers: Answers without and with pruning.
    """
    panels, captions = [image], [f"all {len(pictures.pruning.places)} visual tokens: {answers[0]}"]
    for panel, caption in pictures.panels():
        panels.append(panel)
        captions.append(f"{caption}: {answers[1]}")
    return draw.side_by_side(panels, captions)


def _drawable(found: list[View]) -> list[View]:
    """The views with pictures scaled down to `draw.MAX_SIDE`; boxes are in shares and stay the same."""
    small: dict[int, Image] = {}
    for view in found:
        if id(view.picture) not in small:
            small[id(view.picture)] = draw.shrunk(view.picture)
    return [replace(view, picture=small[id(view.picture)]) for view in found]


def _placeholders(pruning: PruningRecord) -> list[View]:
    """Gray pictures, one for every grid of tokens, in place of originals that were not given."""
    from PIL import Image as images

    places = pruning.places
    keys = np.stack([t.numpy() for t in (places.image, places.frame, places.crop)])
    out = []
    for key in np.unique(keys, axis=1).T:
        here = np.flatnonzero((keys == key[:, None]).all(0) & (places.grid_row.numpy() >= 0))
        if not len(here):
            continue
        row, col = places.grid_row.numpy()[here], places.grid_col.numpy()[here]
        rows, cols = int(row.max()) + 1, int(col.max()) + 1
        boxes = np.stack([col / cols, row / rows, (col + 1) / cols, (row + 1) / rows], 1)
        size = cols * _PIXELS_PER_TOKEN, rows * _PIXELS_PER_TOKEN
        out.append(View(images.new("RGB", size, "#bbbbbb"), here, boxes))
    if not out:
        raise PictureError("the visual tokens of this call have no known places in a picture")
    return out


def _several(images: Any) -> list[Any]:
    if images is None:
        return []
    if isinstance(images, (list, tuple)):
        return list(images)
    return list(images) if getattr(images, "ndim", 0) == 4 else [images]


def _picture(image: Any) -> Image:
    """RGB picture from a PIL picture, an array, a tensor or a path."""
    from PIL import Image as images

    from ..core.images import picture

    if isinstance(image, images.Image):
        return image.convert("RGB")
    if isinstance(image, (str, Path)):
        return picture(str(image))
    array = np.asarray(image.detach().cpu() if hasattr(image, "detach") else image)
    if array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[-1] not in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.dtype.kind == "f" and array.size and array.min() >= 0 and array.max() <= 1:
        array = array * 255
    array = array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array
    if array.ndim not in (2, 3) or not array.size or array.min() < 0 or array.max() > 255:
        raise PictureError(
            f"a {type(image).__name__} of shape {array.shape} is no picture; expected [H, W, 3] or [3, H, W], bytes or "
            "floats from 0 to 1, as it was before the processor"
        )
    return images.fromarray(np.rint(array).astype(np.uint8)).convert("RGB")
