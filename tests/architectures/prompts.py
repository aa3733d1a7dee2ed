# SPDX-License-Identifier: Apache-2.0
"""Synthetic prompts for any architecture: pixels through the vision tower where possible, else random features.

The arguments beside `input_ids` follow from the signature of the model's forward. If several formats are possible
(features as a list, one tensor, a tensor per picture), the first one that the unpruned model accepts is used.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from tests.architectures.build import FIRST_TEXT, VOCAB, WIDTH

IMAGE = "image"
ONE: list[list[Any]] = [[5, IMAGE, 6]]
TWO: list[list[Any]] = [[5, IMAGE, 6], [4, IMAGE, 3, IMAGE, 7]]
_STARTS = ("vision_start_token_id", "image_start_token_id", "boi_token_id", "boi_token_index", "im_start_id")
_ENDS = ("vision_end_token_id", "image_end_token_id", "eoi_token_id", "eoi_token_index", "im_end_id")


@dataclass
class Features(ModelOutput):
    """Output of a vision encoder, under all attribute names that models read."""

    last_hidden_state: Any = None
    pooler_output: Any = None
    deepstack_features: Any = None
    vision_outputs: Any = None
    qformer_outputs: Any = None
    router_logits: Any = None


@dataclass
class Feed:
    """One input format for pictures or clips.

    Attributes:
        name: "pixels" or "features", and the format.
        kind: Modality of the placeholder, "image" or "video".
        lengths: Number of placeholders by picture number.
        arguments: Makes the model's arguments from picture numbers.
    """

    name: str
    kind: str
    lengths: list[int]
    arguments: Callable[[list[int]], dict[str, Any]]


@dataclass
class Prompts:
    """Turns lists of parts (a number of text tokens, or a picture) into a model's arguments."""

    model: nn.Module
    placeholder: int
    feed: Feed
    start: int | None = None
    end: int | None = None
    wants: set[str] = field(default_factory=set)

    def batch(self, prompts: Sequence[Sequence[Any]], padding: str = "left") -> dict[str, Any]:
        """Padded inputs; each prompt's content is independent of the rest of the batch."""
        rows, pictures = [], []
        for prompt in prompts:
            generator, row, number = torch.Generator().manual_seed(7), [1], 0
            for part in prompt:
                if part == IMAGE:
                    wrap = [[i] if i is not None else [] for i in (self.start, self.end)]
                    row += [*wrap[0], *[self.placeholder] * self.feed.lengths[number], *wrap[1]]
                    pictures.append(number)
                    number += 1
                else:
                    row += torch.randint(FIRST_TEXT, VOCAB // 2, (part,), generator=generator).tolist()
            rows.append(row)
        length = max(map(len, rows))
        ids, mask = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length, dtype=torch.long)
        for i, row in enumerate(rows):
            place = slice(length - len(row), None) if padding == "left" else slice(0, len(row))
            ids[i, place], mask[i, place] = torch.tensor(row), 1
        out: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        out |= self.feed.arguments(pictures) if pictures else {}
        for name in ("mm_token_type_ids", "token_type_ids", "moe_mm_token_type_ids"):
            if name in self.wants:
                out[name] = (ids == self.placeholder).long() * (2 if self.feed.kind == "video" else 1)
        return out


def extended(batch: dict[str, Any], tokens: Tensor) -> dict[str, Any]:
    """The batch with generated tokens appended."""
    out = dict(batch)
    for name, value in batch.items():
        if isinstance(value, Tensor) and value.dim() == 2 and value.shape == batch["input_ids"].shape:
            new = tokens if name == "input_ids" else torch.full_like(tokens, int(name == "attention_mask"))
            out[name] = torch.cat([value, new], 1)
    return out


def prompts_for(model: nn.Module, placeholders: dict[str, int], kind: str = "") -> Prompts:
    """Finds a format in which `model` accepts pictures or clips.

    Args:
        model: Small model from `build`.
        placeholders: Modality to token id.
        kind: "image" or "video"; by default pictures if the model accepts any.

    Raises:
        RuntimeError: The model accepts none of the formats; the message holds the first error.
    """
    kind = kind or ("image" if "image" in placeholders else next(iter(placeholders)))
    configs = [model.config, getattr(model.config, "vlm_config", None)]

    def special(names: Sequence[str]) -> int | None:
        values = (getattr(c, n, None) for c in configs if c is not None for n in names)
        return next((v for v in values if isinstance(v, int) and v not in placeholders.values()), None)

    accepted = _parameters(model)
    types = {"mm_token_type_ids", "token_type_ids", "moe_mm_token_type_ids"}
    types &= set(inspect.signature(model.forward).parameters)
    failure: Exception | None = None
    for feed in _feeds(model, kind, accepted):
        for wants in (types, types - {"token_type_ids"}):
            prompts = Prompts(model, placeholders[kind], feed, special(_STARTS), special(_ENDS), wants)
            try:
                with torch.no_grad():
                    plain = model(**prompts.batch(ONE)).logits
                    both = model(**prompts.batch(TWO)).logits
                if torch.isfinite(plain).all() and both.shape[0] == 2:
                    return prompts
                failure = RuntimeError("logits of the small model are not finite")
            except Exception as error:  # whatever a model's forward may raise
                failure = failure or error
            if wants == types - {"token_type_ids"}:
                break
    if failure is None:
        raise RuntimeError(
            f"{type(model).__name__}.forward takes {kind} features neither as mm_encoder_outputs nor in a form of "
            f"pixels that is known here; its arguments are {', '.join(sorted(accepted))}"
        )
    raise RuntimeError(f"{type(failure).__name__}: {failure}") from failure


def _parameters(model: nn.Module) -> set[str]:
    names = set(inspect.signature(model.forward).parameters)
    for child in model.children():
        if hasattr(child, "config") and hasattr(child, "get_input_embeddings"):
            names |= set(inspect.signature(child.forward).parameters)
    return names


def _feeds(model: nn.Module, kind: str, accepted: set[str]) -> Iterator[Feed]:
    vision = getattr(model.config, "vision_config", None) or model.config
    merge = getattr(vision, "spatial_merge_size", None) or getattr(vision, "merge_size", None) or 1
    merge = merge if isinstance(merge, int) else 2
    still = [(1, 4 * merge, 4 * merge), (1, 2 * merge, 6 * merge), (1, 4 * merge, 2 * merge)]
    moving = [(2, 2 * merge, 4 * merge), (3, 2 * merge, 2 * merge), (2, 2 * merge, 2 * merge)]
    encode = next(
        (
            getattr(m, f"get_{kind}_features")
            for m in (model, getattr(model, "model", model))
            if hasattr(m, f"get_{kind}_features")
        ),
        None,
    )
    grid_name = f"{kind}_grid_thw"
    pixel_name = "pixel_values" if kind == "image" else "pixel_values_videos"
    for grids in [still] if kind == "image" else [moving, still]:
        if encode is not None and pixel_name in accepted:
            grid = grid_name if grid_name in accepted else ""
            yield from _pixel_feeds(encode, kind, pixel_name, grid, grids, vision, accepted)
        if "mm_encoder_outputs" not in accepted:
            continue
        lengths = [t * h * w // merge**2 for t, h, w in grids] if grid_name in accepted else [16, 16, 16]
        for form in ("list", "flat", "stack"):
            yield _feature_feed(model, kind, form, lengths, grid_name if grid_name in accepted else "", grids)


def _noise(number: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(100 + number))


def _pixel_feeds(
    encode: Callable,
    kind: str,
    pixels: str,
    grid: str,
    grids: list[tuple[int, int, int]],
    vision: Any,
    accepted: set[str],
) -> Iterator[Feed]:
    """Yields the pixel formats in which the encoder accepts two pictures."""
    patch = getattr(vision, "patch_size", 14)
    patch = patch[0] if isinstance(patch, (list, tuple)) else patch
    size = getattr(vision, "image_size", None) or 8 * patch
    size = size[0] if isinstance(size, (list, tuple)) else size
    channels = getattr(vision, "in_channels", None) or getattr(vision, "num_channels", None) or 3
    deep = getattr(vision, "temporal_patch_size", None) or 1

    def rows(depth: int) -> Callable[[list[int]], dict[str, Any]]:
        def make(numbers: list[int]) -> dict[str, Any]:
            flat = [
                _noise(n, grids[n][0] * grids[n][1] * grids[n][2], channels * depth * patch * patch) for n in numbers
            ]
            return {pixels: torch.cat(flat), grid: torch.tensor([grids[n] for n in numbers])}

        return make

    def patches(numbers: list[int]) -> dict[str, Any]:
        flat = [_noise(n, grids[n][0] * grids[n][1] * grids[n][2], channels, patch, patch) for n in numbers]
        return {pixels: torch.cat(flat), grid: torch.tensor([grids[n] for n in numbers])}

    def squares(numbers: list[int]) -> dict[str, Any]:
        return {pixels: torch.stack([_noise(n, channels, size, size) for n in numbers])}

    def sized(numbers: list[int]) -> dict[str, Any]:
        return squares(numbers) | {"image_sizes": torch.tensor([[size, size] for _ in numbers])}

    def tiles(numbers: list[int]) -> dict[str, Any]:
        plain = torch.stack([_noise(n, 2, channels, size, size) for n in numbers])
        return {pixels: plain, "image_sizes": torch.tensor([[size, size] for _ in numbers])}

    def boxed(numbers: list[int]) -> dict[str, Any]:
        return {pixels: torch.stack([_noise(n, channels, size, size) for n in numbers])[:, None]}

    def clips(numbers: list[int]) -> dict[str, Any]:
        return {pixels: torch.stack([_noise(n, 2 * deep, channels, size, size) for n in numbers])}

    forms: list[tuple[str, Callable[[list[int]], dict[str, Any]]]] = []
    if kind == "video":
        forms.append(("clips", clips))
    if grid:
        forms += [("rows", rows(deep)), ("rows", rows(1)), ("patches", patches)]
    forms += [("squares", squares), ("sized squares", sized), ("tiles", tiles), ("boxed", boxed)]
    known = set(inspect.signature(encode).parameters)
    questions = {n for n in ("qformer_input_ids", "qformer_attention_mask") if n in known}

    def asking(make: Callable[[list[int]], dict[str, Any]]) -> Callable[[list[int]], dict[str, Any]]:
        return lambda numbers: (
            make(numbers) | {name: torch.ones(len(numbers), 3, dtype=torch.long) for name in questions}
        )

    for name, plain in forms:
        make = asking(plain) if questions else plain
        if not accepted >= set(make([0])):
            continue
        try:
            with torch.no_grad():
                lengths = [_length(encode(**{k: v for k, v in make([n]).items() if k in known})) for n in range(3)]
        except Exception:  # a format that this encoder does not accept
            continue
        if all(length is not None and 0 < length <= 80 for length in lengths):
            yield Feed(f"pixels ({name})", kind, lengths, make)  # type: ignore[arg-type]


def _length(output: Any) -> int | None:
    found = getattr(output, "pooler_output", None)
    if isinstance(found, Tensor):
        return int(found.shape[:-1].numel())
    if isinstance(found, (list, tuple)) and all(isinstance(f, Tensor) for f in found):
        return sum(int(f.shape[:-1].numel()) for f in found)
    return None


def _feature_feed(
    model: nn.Module, kind: str, form: str, lengths: list[int], grid: str, grids: list[tuple[int, int, int]]
) -> Feed:
    config = model.config
    vision = getattr(config, "vision_config", None) or config
    levels = len(getattr(vision, "deepstack_visual_indexes", None) or [])
    layer_map = list(getattr(config, "deepstack_layer_map", None) or [])
    spatial = list(getattr(config, "spatial_target_layers", None) or []) if layer_map else []
    targets = [layer for _, layer in layer_map] + spatial

    def shaped(parts: list[Tensor]) -> Any:
        return tuple(parts) if form == "list" else torch.cat(parts) if form == "flat" else torch.stack(parts)

    def make(numbers: list[int]) -> dict[str, Any]:
        parts = [_noise(n, lengths[n], WIDTH) * 0.5 for n in numbers]
        try:
            features = shaped(parts)
        except RuntimeError:
            features = torch.cat(parts)
        deepstack: Any = [tuple(p * (0.3 + 0.1 * level) for p in parts) for level in range(levels)] or None
        if targets:
            deepstack = [(layer, [p * (0.3 + 0.1 * i) for p in parts]) for i, layer in enumerate(targets)]
        output = Features(features, features, deepstack)
        out: dict[str, Any] = {"mm_encoder_outputs": {kind: output}}
        return out | ({grid: torch.tensor([grids[n] for n in numbers])} if grid else {})

    return Feed(f"features ({form})", kind, lengths, make)
