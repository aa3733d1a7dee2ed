# SPDX-License-Identifier: Apache-2.0
"""Which prompt columns are visual, and which image, frame, crop, row and column of the picture each one shows.

Columns come from the placeholder ids in `input_ids` (or the placeholder embeddings in `inputs_embeds`), never from a
fixed offset. Places in the picture come from what the caller passes along with the pixels, by layout:

* `*_grid_thw` (Qwen-VL and kin): frames x rows x columns, divided by the spatial merge;
* any-resolution tiles (models with `pack_image_features`): the model's own packing is run on coordinate planes, so that
  unpadding, shrinking and newline columns come out as the model does them;
* otherwise every unbroken run of placeholders is an image of its own: a square grid, or equal square crops of
  `image_seq_length` tokens, or video frames of equal square grids (as many as the pixels have, where they are known),
  possibly with one newline at the end.

A token without a place in the picture (a newline) has row and column -1. It is a visual token like the others: it is
scored, and it may be dropped. Text and tags between runs (tile names, timestamps) are never visual.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import NothingPrunedError
from . import row_tokens
from .anatomy import Anatomy
from .encoder_outputs import Encoded

# Models whose processors cut a picture into crops that follow each other without a tag between them. Everywhere else
# each of the encoder's outputs is a picture.
_TILES_IN_ONE_RUN = {"cohere2_vision", "got_ocr2", "internvl", "perception_lm", "qianfan_ocr"}


@dataclass
class VisualTokens:
    """The visual columns of one call, on the CPU, in the order sample, column.

    Attributes:
        mask: `[B, T]` bool.
        sample, position, index: `[M]` sample, prompt column, running number within the sample.
        feature: `[M]` row of the encoder's output that fills the column; images count first, then videos. Beams share
            rows.
        image, frame, crop, grid_row, grid_col: `[M]`; `image` counts through the batch.
        counts: Visual tokens of each sample.
        kind: `[M]` number of the kind of features among the anatomy's placeholders.
        derived: What else was worked out from these columns alone; shared by all calls with the same layout, and left
            behind when an instance is copied or pickled.
    """

    mask: Tensor
    sample: Tensor
    position: Tensor
    index: Tensor
    feature: Tensor
    image: Tensor
    frame: Tensor
    crop: Tensor
    grid_row: Tensor
    grid_col: Tensor
    counts: list[int]
    kind: Tensor
    derived: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "derived": {}}

    def __len__(self) -> int:
        return len(self.sample)

    def visible(self, real: Tensor) -> VisualTokens | None:
        """Those that the attention mask `real` `[B, T]` shows; None where it shows none."""
        seen = real[self.sample, self.position]
        if bool(seen.all()):
            return self
        if not bool(seen.any()):
            return None
        mask = self.mask & real
        counts = mask.sum(1)
        sample = self.sample[seen]
        fields: dict[str, Any] = {
            n: v[seen] for n, v in vars(self).items() if isinstance(v, Tensor) and n not in ("mask", "index")
        }
        index = torch.arange(len(sample)) - (counts.cumsum(0) - counts)[sample]
        return VisualTokens(mask=mask, index=index, counts=counts.tolist(), **fields)


def placeholder_kinds(inputs: dict[str, Any], anatomy: Anatomy, present: Container[str]) -> Tensor | None:
    """Marks the placeholders of a call.

    Args:
        inputs: Keyword arguments of the composite's forward.
        anatomy: Parts of the model.
        present: Kinds that come with features; the placeholders of others are text.

    Returns:
        Tensor: `[B, T]` int on the CPU: 0 for text, 1 + i for the i-th kind of `anatomy.placeholders`; None if the call
        has neither `input_ids` nor `inputs_embeds`.
    """
    ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
    if ids is not None:
        kinds = torch.zeros(ids.shape, dtype=torch.uint8, device=ids.device)
        for i, (name, token) in enumerate(anatomy.placeholders.items()):
            if name in present:
                kinds.masked_fill_(ids == token, i + 1)
        return kinds.cpu()
    if embeds is None:
        return None
    kinds = torch.zeros(embeds.shape[:2], dtype=torch.uint8, device=embeds.device)
    for i, (name, token) in enumerate(anatomy.placeholders.items()):
        if name not in present:
            continue
        with torch.no_grad():
            embedding = anatomy.embeddings(torch.tensor(token, device=embeds.device))
        kinds.masked_fill_((embeds == embedding).all(-1), i + 1)
    return kinds.cpu()


class LayoutMemo:
    """The visual tokens of the last few layouts: prompts that differ in words and pixels only have the same.

    What decides is the kind of every column, and the arguments that say how pictures and clips are divided.
    """

    _MOST = 16

    def __init__(self) -> None:
        self._known: dict[Any, VisualTokens] = {}

    def locate(self, inputs: dict[str, Any], anatomy: Anatomy, encoded: dict[str, Encoded]) -> VisualTokens | None:
        """As `locate`; what is returned shares its tensors with other calls and must not be changed in place."""
        kinds = placeholder_kinds(inputs, anatomy, encoded)
        if kinds is None:
            return None
        said = [(name, e.total, _plain(e.lengths), *_division({**inputs, **e.inputs})) for name, e in encoded.items()]
        # Tensors made in inference mode cannot take part in training later.
        key = (kinds.shape, kinds.numpy().tobytes(), tuple(said), torch.is_inference_mode_enabled())
        found = self._known.get(key)
        if found is None:
            found = _locate(kinds, inputs, anatomy, encoded)
            if found is None:
                return None
            if len(self._known) >= self._MOST:
                self._known.clear()
            self._known[key] = found
        return replace(found)  # its features are numbered anew for copies of a sample


def _division(inputs: dict[str, Any]) -> Iterator[Any]:
    """What an encoder's arguments say of the division of pictures and clips."""
    for name in ("image_grid_thw", "video_grid_thw", "image_sizes", "batch_num_images"):
        yield _plain(inputs.get(name))
    clips = inputs.get("pixel_values_videos")
    yield tuple(clips.shape) if isinstance(clips, Tensor) else None


def _plain(value: Any) -> Any:
    """Tensors and lists as tuples of numbers."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return tuple(_plain(item) for item in value) if isinstance(value, (list, tuple)) else value


def locate(
    inputs: dict[str, Any], anatomy: Anatomy, encoded: dict[str, Encoded], kinds: Tensor | None = None
) -> VisualTokens | None:
    """Finds the visual tokens of a call.

    Args:
        inputs: Keyword arguments of the composite's forward.
        anatomy: Parts of the model.
        encoded: What is known of the features that the call brings, by kind. A placeholder without features (a model
            may generate one) is text.
        kinds: `[B, T]` as `placeholder_kinds` returns, where they are known already.

    Returns:
        VisualTokens: None for a call without visual tokens (text, or a decoding step).
    """
    kinds = placeholder_kinds(inputs, anatomy, encoded) if kinds is None else kinds
    return None if kinds is None else _locate(kinds, inputs, anatomy, encoded)


def _locate(
    kinds: Tensor, inputs: dict[str, Any], anatomy: Anatomy, encoded: dict[str, Encoded]
) -> VisualTokens | None:
    """`locate`, from the kind of every column."""
    if not kinds.any():
        return None
    sample, column = kinds.nonzero().unbind(1)
    kind = kinds[sample, column]
    counts = kinds.bool().sum(1)
    index = torch.arange(len(sample)) - (counts.cumsum(0) - counts)[sample]
    feature = torch.zeros_like(sample)
    place = torch.zeros(len(sample), 5, dtype=torch.long)  # image, frame, crop, row, col
    features = images = 0
    for i, name in enumerate(anatomy.placeholders):
        mine = kind == i + 1
        if not mine.any():
            continue
        rows, first = _feature_rows(sample[mine], kinds == i + 1, encoded[name].total)
        known, runs = encoded[name], _runs(sample[mine][first], column[mine][first])
        if name == "image" and getattr(anatomy.config, "model_type", None) not in _TILES_IN_ONE_RUN:
            runs = _apart(*runs, known.lengths)
        layout = _layout(name, {**inputs, **known.inputs}, anatomy, *runs, known.lengths)
        numbers = torch.repeat_interleave(torch.arange(len(layout)), torch.tensor([len(x) for x in layout]))
        place[mine, 1:] = torch.cat(layout)[rows]
        # Beams show the same picture, but each row of the batch has an image of its own.
        place[mine, 0] = numbers[rows] + sample[mine] * len(layout) + images
        feature[mine] = rows + features
        features, images = features + int(first.sum()), images + len(layout) * len(kinds)
    place[:, 0] = torch.unique(place[:, 0], return_inverse=True)[1]
    image, frame, crop, row, col = place.unbind(1)
    return VisualTokens(
        kinds.bool(), sample, column, index, feature, image, frame, crop, row, col, counts.tolist(), kind.long() - 1
    )


def refuse_stand_ins(visual: VisualTokens, encoded: dict[str, Encoded], budget: str) -> None:
    """Raises where each picture has one placeholder and no encoder says that it has one feature: a model may mix its
    pictures into the prompt from the side, and then there is nothing to drop."""
    if all(known.total is None for known in encoded.values()) and len(visual.image.unique()) == len(visual):
        raise NothingPrunedError(
            f"{budget} of one placeholder a picture rounds to all of them, and the model does not say that a picture "
            "has a single feature; expected one placeholder per visual token in input_ids"
        )


def _feature_rows(sample: Tensor, mask: Tensor, total: int | None) -> tuple[Tensor, Tensor]:
    """Which row of the encoder's output fills each placeholder of a kind, and which placeholders are the first to show
    theirs.

    `generate` repeats every sample for beams and returned sequences, one copy after the other, but encodes it once.
    """
    copies = len(sample) // total if total and len(sample) % total == 0 else 1
    counts = mask.sum(1)
    if copies > 1:
        groups = counts.view(-1, copies) if len(counts) % copies == 0 else None
        if groups is None or not torch.equal(groups, groups[:, :1].expand_as(groups)):
            copies = 1
    first = sample % copies == 0
    starts = torch.zeros(len(counts), dtype=torch.long)
    per_group = counts[::copies]
    starts += (per_group.cumsum(0) - per_group).repeat_interleave(copies)
    within = torch.arange(len(sample)) - (counts.cumsum(0) - counts)[sample]
    return starts[sample] + within, first


def _runs(sample: Tensor, column: Tensor) -> tuple[list[int], list[int]]:
    """Lengths of the unbroken runs of placeholders, and the columns before each since the last (0: a new sample)."""
    breaks = (sample.diff() != 0) | (column.diff() != 1)
    gaps = torch.where(sample.diff() != 0, 0, column.diff() - 1)[breaks]
    edges = [0, *(breaks.nonzero()[:, 0] + 1).tolist(), len(sample)]
    return [b - a for a, b in zip(edges, edges[1:], strict=False)], [0, *gaps.tolist()]


def _apart(runs: list[int], gaps: list[int], lengths: list[int] | None) -> tuple[list[int], list[int]]:
    """Splits runs in which pictures stand side by side, where the encoder tells how long each picture is."""
    if lengths is None or sum(lengths) != sum(runs) or len(lengths) <= len(runs):
        return runs, gaps
    left, parts, spaces = list(lengths), [], []
    for run, gap in zip(runs, gaps, strict=True):
        mine: list[int] = []
        while sum(mine) < run:
            mine.append(left.pop(0))
        if sum(mine) != run:  # a picture that goes on after a gap
            return runs, gaps
        parts += mine
        spaces += [gap, *[0] * (len(mine) - 1)]
    return parts, spaces


def _layout(
    kind: str, inputs: dict[str, Any], anatomy: Anatomy, runs: list[int], gaps: list[int], lengths: list[int] | None
) -> list[Tensor]:
    """For every image, `[n, 4]` frame, crop, row, column. The sum of all `n` is the number of placeholders."""
    total = sum(runs)
    for attempt in (_from_grid, _from_packing):
        images = attempt(kind, inputs, anatomy)
        if images is not None and sum(map(len, images)) == total:
            return images
    clips = inputs.get("pixel_values_videos") if kind == "video" else None
    if isinstance(clips, Tensor) and clips.dim() == 5 and len(clips) == len(runs):  # a run is a clip
        known = [_frames(n, clips.shape[1]) for n in runs]
        if all(clip is not None for clip in known):
            return [clip for clip in known if clip is not None]
    crop = getattr(anatomy.config, "image_seq_length", None)
    strategy = inputs.get("vision_feature_select_strategy") or getattr(
        anatomy.config, "vision_feature_select_strategy", None
    )

    def alone(length: int) -> Tensor:
        side = math.isqrt(max(length - 1, 0))
        if strategy == "full" and side and side * side == length - 1:  # a class token, which shows no place, is kept
            return torch.cat([torch.tensor([[0, 0, -1, -1]]), grid_places(1, side, side)])
        return run_places(length, kind, crop if isinstance(crop, int) else None)

    return row_tokens.pictures(runs, gaps, lengths, alone) or [alone(n) for n in runs]


def _frames(length: int, frames: int) -> Tensor | None:
    """Places of a clip of some square frames, with at most one newline at the end; None where that cannot be."""
    for tail in (0, 1):
        side = math.isqrt((length - tail) // frames)
        if side and frames * side * side == length - tail:
            return torch.cat([grid_places(frames, side, side), torch.full((tail, 4), -1)])
    return None


def grid_places(frames: int, rows: int, cols: int) -> Tensor:
    """`[frames * rows * cols, 4]` places in row-major order, crop 0."""
    frame, row, col = torch.meshgrid(torch.arange(frames), torch.arange(rows), torch.arange(cols), indexing="ij")
    return torch.stack([frame, torch.zeros_like(frame), row, col], -1).reshape(-1, 4)


def _from_grid(kind: str, inputs: dict[str, Any], anatomy: Anatomy) -> list[Tensor] | None:
    grids = inputs.get(f"{kind}_grid_thw")
    if grids is None:
        return None
    vision = getattr(anatomy.config, "vision_config", anatomy.config)
    merge = getattr(vision, "spatial_merge_size", None) or getattr(anatomy.vision_tower, "spatial_merge_size", 1)
    return [grid_places(t, h // merge, w // merge) for t, h, w in torch.as_tensor(grids).tolist()]


def _from_packing(kind: str, inputs: dict[str, Any], anatomy: Anatomy) -> list[Tensor] | None:
    sizes, pack = inputs.get("image_sizes"), getattr(anatomy.composite, "pack_image_features", None)
    count = getattr(sys.modules[type(anatomy.composite).__module__], "image_size_to_num_patches", None)
    if kind != "image" or sizes is None or pack is None or count is None:
        return None
    config = anatomy.config
    side = config.vision_config.image_size // config.vision_config.patch_size
    sizes = torch.as_tensor(sizes).cpu()
    per_sample = inputs.get("batch_num_images")
    single = [True] * len(sizes) if per_sample is None else [n == 1 for n in per_sample for _ in range(n)]
    tiles = [
        count(size, config.image_grid_pinpoints, config.vision_config.image_size) if alone else 1
        for size, alone in zip(sizes, single, strict=True)
    ]
    return pack_planes(anatomy, [_coordinates(n, side) for n in tiles], sizes, newline=torch.full((3,), -1.0))


def pack_planes(anatomy: Anatomy, planes: Sequence[Tensor], sizes: Tensor, newline: Tensor) -> list[Tensor]:
    """Runs the model's own any-resolution packed layout on planes of coordinates (crop, row, column).

    Args:
        anatomy: Parts of a model with `pack_image_features`.
        planes: For each image `[tiles, side * side, 3]`.
        sizes: `[images, 2]` original heights and widths.
        newline: `[3]` what a newline token gets.

    Returns:
        list: For each image `[n, 4]` frame (0), crop, row, column. Rows and columns of the tile grid are counted afresh
        from the top left of the unpadded picture; newlines have -1 in both.
    """
    pack: Any = anatomy.composite.pack_image_features
    # LLaVA-NeXT wants to be told that the class token is gone; OneVision has none, and shrinks large pictures.
    known = {
        "vision_feature_select_strategy": "default",
        "vision_aspect_ratio": getattr(anatomy.config, "vision_aspect_ratio", None),
    }
    wanted = inspect.signature(pack).parameters
    extra = {name: value for name, value in known.items() if name in wanted and value is not None}
    packed, _ = pack(list(planes), sizes, image_newline=newline, **extra)
    images = []
    for plane in packed:
        crop, place = plane[:, 0].round(), plane[:, 1:]
        out = torch.full((len(plane), 4), -1)
        out[:, 0] = 0
        out[:, 1] = (crop > 0).long()
        thumbnail = crop == 0
        out[thumbnail, 2:] = place[thumbnail].round().long()
        tiles = (~thumbnail).nonzero()[:, 0]
        line_ends = (crop[tiles] < 0).nonzero()[:, 0]
        width = int(line_ends[0]) + 1 if len(line_ends) else len(tiles)
        if len(tiles):
            order = torch.arange(len(tiles))
            real = crop[tiles] > 0
            out[tiles, 1] = 1
            out[tiles[real], 2] = torch.div(order[real], width, rounding_mode="floor")
            out[tiles[real], 3] = order[real] % width
        images.append(out)
    return images


def _coordinates(tiles: int, side: int) -> Tensor:
    """`[tiles, side * side, 3]`: crop (0 thumbnail, 1 tile), row and column inside the crop."""
    row, col = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    plane = torch.stack([torch.zeros_like(row), row, col], -1).reshape(1, -1, 3).repeat(tiles, 1, 1).float()
    plane[1:, :, 0] = 1
    return plane


def run_places(length: int, kind: str, crop: int | None) -> Tensor:
    """Places of a run about which nothing else is known."""
    side = math.isqrt(length)
    if kind == "image" and crop and length % crop == 0 and math.isqrt(crop) ** 2 == crop and length != crop:
        out = grid_places(length // crop, math.isqrt(crop), math.isqrt(crop))
        return out[:, [1, 0, 2, 3]]  # crops lie where frames were counted
    if side * side == length:
        return grid_places(1, side, side)
    for tail in (0, 1):  # a newline token may close the run
        body = length - tail
        squares = [s for s in range(math.isqrt(body), 1, -1) if body % (s * s) == 0]
        if squares:
            frames = body // squares[0] ** 2
            out = grid_places(frames, squares[0], squares[0])
            if kind == "image":
                out = out[:, [1, 0, 2, 3]] if frames > 1 else out
            return torch.cat([out, torch.full((tail, 4), -1)])
    out = torch.full((length, 4), -1)
    out[:, :2] = 0
    return out
