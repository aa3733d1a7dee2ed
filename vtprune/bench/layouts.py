# SPDX-License-Identifier: Apache-2.0
"""Random prompts with a given number of visual tokens, for the picture layouts of different model families."""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FRAMES = 16  # of a clip
# For each model, the picture size found for a number of tokens, because the search is slow.
_SIZES: weakref.WeakKeyDictionary[Any, dict[int, tuple[int, int]]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Pictures:
    """The pictures of one sample.

    Attributes:
        tokens: Number of their visual tokens in the prompt.
        data: Arguments of the model, whose first dimension runs over the pictures of all samples, or over samples.
    """

    tokens: int
    data: dict[str, Tensor]


class Layout:
    """Creates pictures for a model."""

    def pictures(self, model: Any, tokens: int, generator: torch.Generator) -> Pictures:
        """Random pictures whose number of visual tokens is as close to `tokens` as the layout allows."""
        raise NotImplementedError

    def placeholders(self, config: Any, tokens: int) -> list[int]:
        """Token ids of the pictures in the prompt, with what stands around them."""
        return [config.image_token_id] * tokens


@dataclass(frozen=True)
class Fixed(Layout):
    """Pictures of one size, with the same number of tokens each (LLaVA-1.5)."""

    def pictures(self, model: Any, tokens: int, generator: torch.Generator) -> Pictures:
        side = model.config.vision_config.image_size
        each = (side // model.config.vision_config.patch_size) ** 2
        count = max(1, round(tokens / each))
        return Pictures(count * each, {"pixel_values": _noise(generator, count, 3, side, side)})


@dataclass(frozen=True)
class Tiles(Layout):
    """One picture in many tiles of few tokens each (SmolVLM)."""

    def pictures(self, model: Any, tokens: int, generator: torch.Generator) -> Pictures:
        vision, factor = model.config.vision_config, model.config.scale_factor
        each = (vision.image_size // vision.patch_size) ** 2 // factor**2
        count = max(1, round(tokens / each))
        return Pictures(
            count * each, {"pixel_values": _noise(generator, 1, count, 3, vision.image_size, vision.image_size)}
        )


@dataclass(frozen=True)
class MergedTiles(Layout):
    """Pictures in tiles of one size that all stand in one list, each with the same number of tokens (InternVL)."""

    def pictures(self, model: Any, tokens: int, generator: torch.Generator) -> Pictures:
        (tall, wide), each = model.config.vision_config.image_size, model.config.image_seq_length
        count = max(1, round(tokens / each))
        return Pictures(count * each, {"pixel_values": _noise(generator, count, 3, tall, wide)})


@dataclass(frozen=True)
class Grid(Layout):
    """One picture of any resolution as a list of patches (Qwen-VL)."""

    def pictures(self, model: Any, tokens: int, generator: torch.Generator) -> Pictures:
        vision = model.config.vision_config
        merge, patch = vision.spatial_merge_size, vision.patch_size
        rows = max(n for n in range(1, math.isqrt(tokens) + 1) if tokens % n == 0)
        if 4 * rows * rows < tokens:  # no rectangle with an aspect ratio below 4 has exactly this many tokens
            rows = math.isqrt(tokens)
        columns = round(tokens / rows)
        grid = [1, rows * merge, columns * merge]
        width = vision.in_channels * vision.temporal_patch_size * patch**2
        data = {"pixel_values": _noise(generator, grid[1] * grid[2], width), "image_grid_thw": torch.tensor([grid])}
        return Pictures(rows * columns, data)

    def placeholders(self, config: Any, tokens: int) -> list[int]:
        return [config.vision_start_token_id, *[config.image_token_id] * tokens, config.vision_end_token_id]


@dataclass(frozen=True)
class GridClip(Grid):
    """A clip of `FRAMES` frames as a list of patches (Qwen-VL)."""

    def pictures(self, model: Any, tokens: int, generator: torch.Generator) -> Pictures:
        vision = model.config.vision_config
        steps = FRAMES // vision.temporal_patch_size
        frame = super().pictures(model, max(1, round(tokens / steps)), generator)
        grid = frame.data["image_grid_thw"] * torch.tensor([steps, 1, 1])
        pixels = _noise(generator, int(grid.prod()), frame.data["pixel_values"].shape[1])
        return Pictures(steps * frame.tokens, {"pixel_values_videos": pixels, "video_grid_thw": grid})

    def placeholders(self, config: Any, tokens: int) -> list[int]:
        # Qwen3-VL writes every time step by itself, between marks.
        parts = FRAMES // config.vision_config.temporal_patch_size if config.model_type.startswith("qwen3") else 1
        inner = [config.video_token_id] * (tokens // parts)
        return [config.vision_start_token_id, *inner, config.vision_end_token_id] * parts


@dataclass(frozen=True)
class AnyRes(Layout):
    """A thumbnail and tiles of every picture, without padding (LLaVA-NeXT, LLaVA-OneVision)."""

    def pictures(self, model: Any, tokens: int, generator: torch.Generator) -> Pictures:
        known = _SIZES.setdefault(model, {})
        if tokens not in known:
            known[tokens] = self._size(model, tokens)
        size, side = known[tokens], model.config.vision_config.image_size
        count = max(1, round(tokens / self._tokens(model, size)))
        pixels = _noise(generator, count, self._tiles(model, size), 3, side, side)
        data = {"pixel_values": pixels, "image_sizes": torch.tensor([size] * count)}
        return Pictures(count * self._tokens(model, size), data)

    def _size(self, model: Any, tokens: int) -> tuple[int, int]:
        """Height and width of pictures that come closest to `tokens`, as few and as square as possible."""

        def rank(size: tuple[int, int]) -> tuple[int, int, float]:
            each = self._tokens(model, size)
            count = max(1, round(tokens / each))
            return abs(count * each - tokens), count, max(size) / min(size)

        side = model.config.vision_config.image_size
        longest = max(map(max, model.config.image_grid_pinpoints))
        sides = range(side // 2, longest + 1, side // 4)
        sizes = [(height, width) for height in sides for width in sides if max(height, width) <= 3 * min(height, width)]
        return min(sizes, key=rank)

    def _tiles(self, model: Any, size: tuple[int, int]) -> int:
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        config = model.config
        return image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size)

    def _tokens(self, model: Any, size: tuple[int, int]) -> int:
        """Number of tokens of a picture after the model's own packing."""
        config, vision = model.config, model.config.vision_config
        empty = torch.zeros(
            self._tiles(model, size), (vision.image_size // vision.patch_size) ** 2, 1, dtype=torch.float32
        )
        select = {"vision_feature_select_strategy": "default"} if config.model_type == "llava_next" else {}
        _, lengths = model.model.pack_image_features(
            [empty], torch.tensor([size]), image_newline=torch.zeros(1, dtype=torch.float32), **select
        )
        return int(lengths[0])


def prompt(model: Any, layout: Layout, batch: int, tokens: int, text: int, seed: int = 0) -> dict[str, Tensor]:
    """Model inputs with random pictures between random text, on the model's device.

    Args:
        model: A model of the layout.
        layout: Layout of its pictures.
        batch: Number of samples, all with pictures of the same sizes.
        tokens: Visual tokens of each, as closely as the layout allows.
        text: Text tokens of each, half of them after the pictures.
        seed: Seed of the generator.

    Returns:
        dict: `input_ids` and `attention_mask` `[B, T]`, and the pictures in the model's dtype.
    """
    generator = torch.Generator().manual_seed(seed)
    config, vocabulary = model.config, model.config.get_text_config().vocab_size
    samples = [layout.pictures(model, tokens, generator) for _ in range(batch)]
    ids = []
    for pictures in samples:
        words = torch.randint(3, vocabulary * 3 // 5, (text,), generator=generator).tolist()
        middle = layout.placeholders(config, pictures.tokens)
        ids.append([1, *words[: text // 2], *middle, *words[text // 2 :]])
    inputs = {"input_ids": torch.tensor(ids)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    for name in samples[0].data:
        value = torch.cat([pictures.data[name] for pictures in samples])
        inputs[name] = value.to(model.dtype) if value.is_floating_point() else value
    if isinstance(layout, Grid):
        clip = isinstance(layout, GridClip)
        seen = inputs["input_ids"] == (config.video_token_id if clip else config.image_token_id)
        inputs["mm_token_type_ids"] = (2 if clip else 1) * seen.long()
    return {name: value.to(model.device) for name, value in inputs.items()}


def _noise(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float32)
