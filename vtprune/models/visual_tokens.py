# SPDX-License-Identifier: Apache-2.0
"""Finds the visual tokens of a prompt: their positions, and the image, frame, crop, row and column of each.

Positions come from the placeholder ids in `input_ids` (or the placeholder embeddings in `inputs_embeds`), never from a
fixed offset. Places in the image come from the arguments that are passed with the pixels, by layout:

* `*_grid_thw` (Qwen-VL and similar): frames x rows x columns, divided by the spatial merge;
* any-resolution tiles (models with `pack_image_features`): the model's own method packs planes of coordinates, so that
  unpadding, shrinking and newline tokens are exactly those of the model;
* otherwise every unbroken run of placeholders is an image of its own: a square grid, or equal square crops of
  `image_seq_length` tokens, or video frames of equal square grids (as many as the pixels have, if known), possibly with
  one newline at the end.

A token without a place in the image (a newline) has row and column -1. It is a visual token like the others: it is
scored, and may be dropped. Text between runs (tile names, timestamps) is never visual.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import NothingPrunedError
from .anatomy import Anatomy
from .any_resolution import pack, tiles_per_image
from .encoder_outputs import Encoded

# Models whose processors cut an image into crops without text between them. In all others, each of the encoder's
# outputs is an image.
_TILES_IN_ONE_RUN = {"cohere2_vision", "got_ocr2", "internvl", "perception_lm", "qianfan_ocr"}
_MOST_DERIVED = 256  # values kept for one layout, most of them for one of its padding masks


@dataclass
class VisualTokens:
    """The visual tokens of one call, on the CPU, ordered by sample, then by position.

    Attributes:
        mask: `[B, T]` bool, True at visual positions.
        sample, position, index: `[M]` sample, prompt position, index among the sample's visual tokens.
        feature: `[M]` row of the encoder's output for each token; images count first, then videos. Beams share rows.
        image, frame, crop, grid_row, grid_col: `[M]` place of each token; `image` counts through the batch.
        counts: Number of visual tokens in each sample.
        kind: `[M]` number of the kind of features among the anatomy's placeholders.
        derived: Cache of values computed from the other fields; shared by all calls with the same layout, and not
            copied or pickled.
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

    def cached(self, key: Any, make: Callable[[], Any]) -> Any:
        """Result of `make`, which depends on these tokens only; made once for all calls with the same layout."""
        found = self.derived.get(key)
        if found is None:
            if len(self.derived) >= _MOST_DERIVED:
                self.derived.clear()
            found = self.derived[key] = make()
        return found

    def visible(self, real: Tensor) -> VisualTokens | None:
        """The visual tokens that an attention mask `real` `[B, T]` with padding does not hide; None if it hides all."""
        return self.cached(("visible", real.numpy().tobytes()), lambda: self._visible(real))

    def _visible(self, real: Tensor) -> VisualTokens | None:
        seen = real[self.sample, self.position]
        if bool(seen.all()):
            return replace(self, derived={})
        if not bool(seen.any()):
            return None
        mask = self.mask & real
        counts = mask.sum(1)
        fields: dict[str, Any] = {
            n: v[seen] for n, v in vars(self).items() if isinstance(v, Tensor) and n not in ("mask", "index")
        }
        index = _index_in_sample(fields["sample"], counts)
        return VisualTokens(mask=mask, index=index, counts=counts.tolist(), **fields)


def _index_in_sample(sample: Tensor, counts: Tensor) -> Tensor:
    """Index `[M]` of each token among those of its sample, from the samples `[M]` and the number `[B]` in each."""
    return torch.arange(len(sample)) - (counts.cumsum(0) - counts)[sample]


def placeholder_kinds(inputs: dict[str, Any], anatomy: Anatomy, present: Container[str]) -> Tensor | None:
    """Marks the placeholders of a call.

    Args:
        inputs: Keyword arguments of the composite's forward.
        anatomy: Parts of the model.
        present: Kinds that come with features; placeholders of other kinds are text.

    Returns:
        Tensor: `[B, T]` int on the CPU: 0 for text, 1 + i for the i-th kind of `anatomy.placeholders`; None if the call
        has neither `input_ids` nor `inputs_embeds`.
    """
    ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
    if ids is not None:
        kinds = None
        for i, (name, token) in enumerate(anatomy.placeholders.items()):
            if name in present:
                here = ids == token
                if kinds is None:
                    kinds = here.view(torch.uint8) * (i + 1) if i else here.view(torch.uint8)
                else:
                    kinds.masked_fill_(here, i + 1)
        return torch.zeros(ids.shape, dtype=torch.uint8) if kinds is None else kinds.cpu()
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
    """Cache of the visual tokens of the last few layouts, keyed by placeholders and by image and clip sizes.

    Prompts that differ only in words and pixels share a layout.
    """

    _MOST = 16

    def __init__(self) -> None:
        self._known: dict[Any, VisualTokens] = {}

    def locate(self, inputs: dict[str, Any], anatomy: Anatomy, encoded: dict[str, Encoded]) -> VisualTokens | None:
        """Same as the function `locate`; the result is shared with other calls and must not be changed in place."""
        kinds = placeholder_kinds(inputs, anatomy, encoded)
        if kinds is None:
            return None
        sizes = [(name, e.total, _plain(e.lengths), *_sizes({**inputs, **e.inputs})) for name, e in encoded.items()]
        # Tensors made in inference mode cannot be used in training later.
        key = (kinds.shape, kinds.numpy().tobytes(), tuple(sizes), torch.is_inference_mode_enabled())
        found = self._known.get(key)
        if found is None:
            found = _locate(kinds, inputs, anatomy, encoded)
            if found is None:
                return None
            if len(self._known) >= self._MOST:
                self._known.clear()
            self._known[key] = found
        return found


def _sizes(inputs: dict[str, Any]) -> Iterator[Any]:
    """Arguments of an encoder that determine the layout of images and clips."""
    for name in ("image_grid_thw", "video_grid_thw", "image_sizes", "batch_num_images"):
        yield _plain(inputs.get(name))
    clips = inputs.get("pixel_values_videos")
    yield tuple(clips.shape) if isinstance(clips, Tensor) else None


def _plain(value: Any) -> Any:
    """Turns tensors and lists into tuples of numbers."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return tuple(_plain(item) for item in value) if isinstance(value, (list, tuple)) else value


def locate(
    inputs: dict[str, Any], anatomy: Anatomy, encoded: dict[str, Encoded], kinds: Tensor | None = None
) -> VisualTokens | None:
    """Finds the visual tokens of a call.

    Args:
        inputs: Keyword arguments of the composite's forward.
        anatomy: Parts of the model.
        encoded: Encoder run of each kind of features that the call gets. A placeholder without features (a model may
            generate one) is text.
        kinds: `[B, T]` result of `placeholder_kinds`, if known already.

    Returns:
        VisualTokens: None for a call without visual tokens (text, or a decoding step).
    """
    kinds = placeholder_kinds(inputs, anatomy, encoded) if kinds is None else kinds
    return None if kinds is None else _locate(kinds, inputs, anatomy, encoded)


def _locate(
    kinds: Tensor, inputs: dict[str, Any], anatomy: Anatomy, encoded: dict[str, Encoded]
) -> VisualTokens | None:
    """`locate`, from the result `[B, T]` of `placeholder_kinds`."""
    if not kinds.any():
        return None
    sample, position = kinds.nonzero().unbind(1)
    kind = kinds[sample, position]
    counts = kinds.bool().sum(1)
    index = _index_in_sample(sample, counts)
    feature = torch.zeros_like(sample)
    place = torch.zeros(len(sample), 5, dtype=torch.long)  # image, frame, crop, row, col
    features = images = 0
    for i, name in enumerate(anatomy.placeholders):
        of_kind = kind == i + 1
        if not of_kind.any():
            continue
        rows, first = _feature_rows(sample[of_kind], kinds == i + 1, encoded[name].total)
        known, runs = encoded[name], _runs(sample[of_kind][first], position[of_kind][first])
        given = {**inputs, **known.inputs}
        if _encodes_one_by_one(name, given, anatomy, known.lengths):
            runs = _split_runs(*runs, known.lengths)
        layout = _layout(name, given, anatomy, *runs, known.lengths)
        numbers = torch.repeat_interleave(torch.arange(len(layout)), torch.tensor([len(x) for x in layout]))
        place[of_kind, 1:] = torch.cat(layout)[rows]
        # Beams share features, but every row of the batch counts as an image of its own.
        place[of_kind, 0] = numbers[rows] + sample[of_kind] * len(layout) + images
        feature[of_kind] = rows + features
        features, images = features + int(first.sum()), images + len(layout) * len(kinds)
    place[:, 0] = torch.unique(place[:, 0], return_inverse=True)[1]
    image, frame, crop, row, col = place.unbind(1)
    return VisualTokens(
        kinds.bool(), sample, position, index, feature, image, frame, crop, row, col, counts.tolist(), kind.long() - 1
    )


def refuse_single_placeholders(visual: VisualTokens, encoded: dict[str, Encoded], budget: str) -> None:
    """Raises if every image has one placeholder and no encoder confirms that it has one feature.

    The model may add its image features to other tokens of the prompt; then there is nothing to drop.
    """
    if all(known.total is None for known in encoded.values()) and len(visual.image.unique()) == len(visual):
        raise NothingPrunedError(
            f"{budget} of one placeholder per image rounds to all of them, and the encoder does not confirm that an "
            "image has a single feature; expected one placeholder per visual token in input_ids"
        )


def _feature_rows(sample: Tensor, mask: Tensor, total: int | None) -> tuple[Tensor, Tensor]:
    """Row of the encoder's output for each placeholder of a kind, and whether it is the first placeholder of that row.

    `generate` repeats every sample for beams and returned sequences, one copy after the other, but encodes it once.
    """
    copies = len(sample) // total if total and len(sample) % total == 0 else 1
    counts = mask.sum(1)
    if copies > 1:
        groups = counts.view(-1, copies) if len(counts) % copies == 0 else None
        if groups is None or not torch.equal(groups, groups[:, :1].expand_as(groups)):
            copies = 1
    per_group = counts[::copies]
    starts = (per_group.cumsum(0) - per_group).repeat_interleave(copies)
    return starts[sample] + _index_in_sample(sample, counts), sample % copies == 0


def _runs(sample: Tensor, position: Tensor) -> tuple[list[int], list[int]]:
    """Lengths of the unbroken runs of placeholders, and the gap before each; 0 for the first of a sample."""
    breaks = (sample.diff() != 0) | (position.diff() != 1)
    gaps = torch.where(sample.diff() != 0, 0, position.diff() - 1)[breaks]
    edges = [0, *(breaks.nonzero()[:, 0] + 1).tolist(), len(sample)]
    return [b - a for a, b in zip(edges, edges[1:], strict=False)], [0, *gaps.tolist()]


def _encodes_one_by_one(kind: str, inputs: dict[str, Any], anatomy: Anatomy, lengths: list[int] | None) -> bool:
    """Whether the lengths that an encoder tells are those of whole images or clips, not of tiles or frames."""
    if kind == "image":
        return getattr(anatomy.config, "model_type", None) not in _TILES_IN_ONE_RUN
    clips = inputs.get("pixel_values_videos")
    return isinstance(clips, Tensor) and clips.dim() == 5 and len(clips) == len(lengths or ())


def _split_runs(runs: list[int], gaps: list[int], lengths: list[int] | None) -> tuple[list[int], list[int]]:
    """Splits runs of several adjacent images, if the encoder tells the length of each image."""
    if lengths is None or sum(lengths) != sum(runs) or len(lengths) <= len(runs):
        return runs, gaps
    left, parts, spaces = list(lengths), [], []
    for run, gap in zip(runs, gaps, strict=True):
        images: list[int] = []
        while sum(images) < run:
            images.append(left.pop(0))
        if sum(images) != run:  # an image that continues after a gap
            return runs, gaps
        parts += images
        spaces += [gap, *[0] * (len(images) - 1)]
    return parts, spaces


def _layout(
    kind: str, inputs: dict[str, Any], anatomy: Anatomy, runs: list[int], gaps: list[int], lengths: list[int] | None
) -> list[Tensor]:
    """Places `[n, 4]` (frame, crop, row, column) of every image; the `n` add up to the number of placeholders."""
    total = sum(runs)
    for layout in (_from_grid, _from_packed_layout):
        images = layout(kind, inputs, anatomy)
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
        if strategy == "full" and side and side * side == length - 1:  # with a class token, which has no place
            return torch.cat([torch.tensor([[0, 0, -1, -1]]), grid_places(1, side, side)])
        return run_places(length, kind, crop if isinstance(crop, int) else None)

    return _join_rows(runs, gaps, lengths, alone) or [alone(n) for n in runs]


def _join_rows(
    runs: list[int], gaps: list[int], lengths: list[int] | None, alone: Callable[[int], Tensor]
) -> list[Tensor] | None:
    """Joins runs that are the rows of one image, separated by a text token (Pixtral, Mistral 3, LightOnOCR).

    The separators are text and stay. Runs are rows, and not images of their own, if together they have as many
    positions as the encoder's output for one image has features.

    Args:
        runs: Lengths of the unbroken runs of placeholders.
        gaps: Positions between each run and the one before it; 0 for the first of a sample.
        lengths: Number of features of each image, if the encoder tells.
        alone: Returns the places `[n, 4]` of a run of `n` that is an image of its own.

    Returns:
        list: For each image `[n, 4]` frame, crop, row, column; None if no image comes in rows.
    """
    if lengths is None or sum(lengths) != sum(runs) or len(lengths) >= len(runs):
        return None
    places, run = [], 0
    for length in lengths:
        start, left = run, length
        while left > 0:
            left, run = left - runs[run], run + 1
        width, count = runs[start] if run > start else 0, run - start
        equal = left == 0 and all(n == width for n in runs[start:run])
        if not equal or any(gap != 1 for gap in gaps[start + 1 : run]):
            return None
        places.append(alone(width) if count == 1 else grid_places(1, count, width))
    return places


def _frames(length: int, frames: int) -> Tensor | None:
    """Places of a clip of square frames with at most one newline at the end; None if the length does not fit."""
    for tail in (0, 1):
        side = math.isqrt((length - tail) // frames)
        if side and frames * side * side == length - tail:
            return torch.cat([grid_places(frames, side, side), torch.full((tail, 4), -1)])
    return None


def grid_places(frames: int, rows: int, cols: int) -> Tensor:
    """Places `[frames * rows * cols, 4]` in row-major order, crop 0."""
    frame, row, col = torch.meshgrid(torch.arange(frames), torch.arange(rows), torch.arange(cols), indexing="ij")
    return torch.stack([frame, torch.zeros_like(frame), row, col], -1).reshape(-1, 4)


def _from_grid(kind: str, inputs: dict[str, Any], anatomy: Anatomy) -> list[Tensor] | None:
    grids = inputs.get(f"{kind}_grid_thw")
    if grids is None:
        return None
    vision = getattr(anatomy.config, "vision_config", anatomy.config)
    merge = getattr(vision, "spatial_merge_size", None) or getattr(anatomy.vision_tower, "spatial_merge_size", 1)
    return [grid_places(t, h // merge, w // merge) for t, h, w in torch.as_tensor(grids).tolist()]


def _from_packed_layout(kind: str, inputs: dict[str, Any], anatomy: Anatomy) -> list[Tensor] | None:
    tiles = tiles_per_image(anatomy, inputs) if kind == "image" else None
    if tiles is None:
        return None
    vision, sizes = anatomy.config.vision_config, torch.as_tensor(inputs["image_sizes"]).cpu()
    side = vision.image_size // vision.patch_size
    newline = torch.full((3,), -1.0, dtype=torch.float32)
    packed = pack(anatomy, [_coordinates(n, side) for n in tiles], sizes, newline, "default")
    return [_unpadded(plane) for plane in packed]


def _unpadded(plane: Tensor) -> Tensor:
    """Places `[n, 4]` of an image from its packed coordinates `[n, 3]` (crop, row, column).

    Rows and columns of the tile grid are counted from the top left of the unpadded image; newlines have -1 in both.
    """
    crop, place = plane[:, 0].round(), plane[:, 1:]
    thumbnail = crop == 0
    out = torch.full((len(plane), 4), -1)
    out[:, 0] = 0
    out[:, 1] = ~thumbnail
    out[thumbnail, 2:] = place[thumbnail].round().long()
    tiles = (~thumbnail).nonzero()[:, 0]
    line_ends = (crop[tiles] < 0).nonzero()[:, 0]
    width = int(line_ends[0]) + 1 if len(line_ends) else len(tiles)
    order = (crop[tiles] > 0).nonzero()[:, 0]
    out[tiles[order], 2] = order // width
    out[tiles[order], 3] = order % width
    return out


def _coordinates(tiles: int, side: int) -> Tensor:
    """Planes `[tiles, side * side, 3]`: crop (0 thumbnail, 1 tile), row and column inside the crop."""
    plane = grid_places(1, side, side)[:, 1:].float().repeat(tiles, 1, 1)
    plane[1:, :, 0] = 1
    return plane


def run_places(length: int, kind: str, crop: int | None) -> Tensor:
    """Places `[length, 4]` of a run of placeholders, guessed from its length alone."""
    side = math.isqrt(length)
    if kind == "image" and crop and 0 < crop < length and length % crop == 0 and math.isqrt(crop) ** 2 == crop:
        out = grid_places(length // crop, math.isqrt(crop), math.isqrt(crop))
        return out[:, [1, 0, 2, 3]]  # the grid's frames are crops
    if side * side == length:
        return grid_places(1, side, side)
    for tail in (0, 1):  # the run may end in a newline token
        body = length - tail
        squares = [s for s in range(math.isqrt(body), 1, -1) if body % (s * s) == 0]
        if squares:
            out = grid_places(body // squares[0] ** 2, squares[0], squares[0])
            out = out[:, [1, 0, 2, 3]] if kind == "image" else out
            return torch.cat([out, torch.full((tail, 4), -1)])
    out = torch.full((length, 4), -1)
    out[:, :2] = 0
    return out
