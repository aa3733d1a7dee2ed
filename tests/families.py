# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of every supported family, from the stock transformers classes, and prompts for them.

A prompt is a list of parts: a number is that many text tokens, `Image(i)` is a picture of the family's i-th size,
`Video(i)` a clip. `Family.batch` turns prompts into what a processor would return: `input_ids` with placeholders,
pixels, padding on the requested side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch

PAD, IMAGE, VIDEO, VISION_START, VISION_END, FIRST_TEXT = 0, 3, 4, 5, 6, 10
VOCAB = 99
LAYERS = 4
TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True)
class Image:
    size: int = 0


@dataclass(frozen=True)
class Video:
    size: int = 0


Part = int | Image | Video
Prompt = Sequence[Part]


@dataclass
class Pixels:
    """One picture or clip, as the processor would prepare it.

    Attributes:
        tokens: Number of placeholders.
        data: Tensors by name of the forward argument.
        wrap: Text ids before and after the placeholders.
        ids: All token ids, instead of `wrap`, where text stands between the placeholders (time stamps of frames).
    """

    tokens: int
    data: dict[str, torch.Tensor]
    wrap: tuple[list[int], list[int]] = ((), ())  # type: ignore[assignment]
    ids: list[int] | None = None


@dataclass
class Family:
    """A model family: config of a tiny model, and layout of its pictures.

    Attributes:
        name: For test ids.
        config: Function that returns the model's config.
        image, video: `(size, generator) -> Pixels`; None where the family has no such input.
        join: Joins the pixel tensors of a batch.
        needs_types: Whether the model needs `mm_token_type_ids`.
    """

    name: str
    config: Callable[[], Any]
    image: Callable[[int, torch.Generator], Pixels]
    video: Callable[[int, torch.Generator], Pixels] | None = None
    join: Callable[[list[list[Pixels]], str], dict[str, torch.Tensor]] = field(
        default=lambda samples, kind: _cat(samples)
    )
    needs_types: bool = False

    def build(self, attention: str = "sdpa", dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.nn.Module:
        """Builds a random model with large weights, so that logits and attention vary clearly between tokens."""
        from transformers import AutoModelForImageTextToText

        torch.manual_seed(seed)
        config = self.config()
        config._attn_implementation = attention
        model = AutoModelForImageTextToText.from_config(config, attn_implementation=attention).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() >= 2:
                    parameter.normal_(0, 0.15 if "embed" not in name else 0.5)
                elif "norm" in name and "weight" in name:
                    parameter.normal_(1, 0.1)
                else:
                    parameter.normal_(0, 0.1)
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = PAD
        # A placeholder that a random model happens to generate has no features: without a cache, transformers would
        # refuse it.
        model.generation_config.suppress_tokens = [IMAGE, VIDEO]
        return model.to(dtype)

    def batch(
        self,
        prompts: Sequence[Prompt],
        padding: str = "left",
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        equal: bool = False,
    ) -> dict[str, torch.Tensor]:
        """Inputs for `prompts`. The content of a prompt does not depend on what else is in the batch.

        With `equal`, all pictures of one size have the same pixels.
        """
        rows: list[list[int]] = []
        images: list[list[Pixels]] = []
        videos: list[list[Pixels]] = []
        for prompt in prompts:
            generator = torch.Generator().manual_seed(seed)
            row, mine, clips = [1], [], []
            for part in prompt:
                if isinstance(part, int):
                    row += torch.randint(FIRST_TEXT, VOCAB, (part,), generator=generator).tolist()
                    continue
                maker, store, token = (
                    (self.image, mine, IMAGE) if isinstance(part, Image) else (self.video, clips, VIDEO)
                )
                assert maker is not None, f"{self.name} has no {type(part).__name__}"
                pixels = maker(part.size, torch.Generator().manual_seed(seed) if equal else generator)
                store.append(pixels)
                row += pixels.ids or [*pixels.wrap[0], *[token] * pixels.tokens, *pixels.wrap[1]]
            rows.append(row)
            images.append(mine)
            videos.append(clips)
        length = max(map(len, rows))
        ids = torch.full((len(rows), length), PAD)
        mask = torch.zeros(len(rows), length, dtype=torch.long)
        for i, row in enumerate(rows):
            place = slice(length - len(row), None) if padding == "left" else slice(0, len(row))
            ids[i, place], mask[i, place] = torch.tensor(row), 1
        out = {"input_ids": ids, "attention_mask": mask}
        if any(images):
            out |= self.join(images, "image")
        if any(videos):
            out |= self.join(videos, "video")
        if self.needs_types:
            out["mm_token_type_ids"] = (ids == IMAGE).long() + 2 * (ids == VIDEO).long()
        return {k: v.to(dtype) if v.is_floating_point() else v for k, v in out.items()}


def _cat(samples: list[list[Pixels]]) -> dict[str, torch.Tensor]:
    flat = [p.data for sample in samples for p in sample]
    return {name: torch.cat([d[name] for d in flat]) for name in flat[0]}


def _random(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator)


def _clip(image_size: int, patch: int) -> dict[str, Any]:
    return {
        "model_type": "clip_vision_model",
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": image_size,
        "patch_size": patch,
        "projection_dim": 24,
    }


def _llava_config() -> Any:
    from transformers import LlavaConfig

    return LlavaConfig(
        vision_config=_clip(20, 4),
        text_config={"model_type": "llama", **TEXT},
        image_token_id=IMAGE,
        image_seq_length=25,
    )


def _llava_image(size: int, generator: torch.Generator) -> Pixels:
    return Pixels(25, {"pixel_values": _random(generator, 1, 3, 20, 20)})


_SIZES = [(30, 14), (16, 16), (12, 31), (40, 40)]  # heights and widths of the original pictures
_PINPOINTS = [[16, 32], [32, 16], [32, 32]]


def _llava_next_config() -> Any:
    from transformers import LlavaNextConfig

    return LlavaNextConfig(
        vision_config=_clip(16, 4),
        text_config={"model_type": "llama", **TEXT},
        image_token_id=IMAGE,
        image_grid_pinpoints=_PINPOINTS,
        image_seq_length=16,
    )


def _onevision_config() -> Any:
    from transformers import LlavaOnevisionConfig

    vision = _clip(16, 4) | {"model_type": "siglip_vision_model", "vision_use_head": False}
    return LlavaOnevisionConfig(
        vision_config=vision,
        text_config={"model_type": "qwen2", **TEXT},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_grid_pinpoints=_PINPOINTS,
        vision_aspect_ratio="anyres_max_9",
        vision_feature_layer=-1,
    )


@lru_cache
def _packing_model(make: Callable[[], Any]) -> torch.nn.Module:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_config(make()).model


def _anyres_image(make: Callable[[], Any], size: int, generator: torch.Generator) -> Pixels:
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    model, original = _packing_model(make), torch.tensor([_SIZES[size % len(_SIZES)]])
    tiles = image_size_to_num_patches(original[0], _PINPOINTS, 16)
    # The model's own packing determines how many tokens remain after unpadding.
    extra = {"vision_feature_select_strategy": "default"} if "Next" in type(model).__name__ else {}
    _, lengths = model.pack_image_features([torch.zeros(tiles, 16, 1)], original, image_newline=torch.zeros(1), **extra)
    pixels = torch.zeros(1, 5, 3, 16, 16)
    pixels[0, :tiles] = _random(generator, tiles, 3, 16, 16)
    return Pixels(int(lengths[0]), {"pixel_values": pixels, "image_sizes": original})


def _onevision_video(size: int, generator: torch.Generator) -> Pixels:
    frames = 3 if size < 2 else 8  # all clips of a batch have the same length
    return Pixels(frames * 4 + 1, {"pixel_values_videos": _random(generator, 1, frames, 3, 16, 16)})


def _join_onevision(samples: list[list[Pixels]], kind: str) -> dict[str, torch.Tensor]:
    return _cat(samples)


_GRIDS = [(1, 8, 8), (1, 4, 12), (1, 12, 8), (1, 4, 4)]
_CLIPS = [(2, 4, 8), (3, 4, 4), (8, 4, 8), (5, 4, 4)]
_QWEN_TEXT = TEXT | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}}
_QWEN_TOWER = {
    "depth": 3,
    "hidden_size": 16,
    "intermediate_size": 24,
    "out_hidden_size": 32,
    "num_heads": 2,
    "patch_size": 4,
}
_QWEN_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}


def _qwen2_config() -> Any:
    from transformers import Qwen2VLConfig

    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2}
    return Qwen2VLConfig(vision_config=vision, text_config=_QWEN_TEXT, **_QWEN_IDS)


def _qwen2_5_config() -> Any:
    from transformers import Qwen2_5_VLConfig

    vision = _QWEN_TOWER | {"window_size": 16, "fullatt_block_indexes": [2]}
    return Qwen2_5_VLConfig(vision_config=vision, text_config=_QWEN_TEXT, **_QWEN_IDS)


def _qwen3_config() -> Any:
    from transformers import Qwen3VLConfig

    vision = _QWEN_TOWER | {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
    return Qwen3VLConfig(vision_config=vision, text_config=_QWEN_TEXT | {"head_dim": 8}, **_QWEN_IDS)


def _qwen_image(size: int, generator: torch.Generator) -> Pixels:
    t, h, w = _GRIDS[size % len(_GRIDS)]
    data = {"pixel_values": _random(generator, t * h * w, 3 * 2 * 4 * 4), "image_grid_thw": torch.tensor([[t, h, w]])}
    return Pixels(t * h * w // 4, data, ([VISION_START], [VISION_END]))


def _qwen_video(size: int, generator: torch.Generator) -> Pixels:
    t, h, w = _CLIPS[size % len(_CLIPS)]
    data = {
        "pixel_values_videos": _random(generator, t * h * w, 3 * 2 * 4 * 4),
        "video_grid_thw": torch.tensor([[t, h, w]]),
    }
    return Pixels(t * h * w // 4, data, ([VISION_START], [VISION_END]))


def _qwen3_video(size: int, generator: torch.Generator) -> Pixels:
    """A clip with a time stamp before every frame."""
    clip = _qwen_video(size, generator)
    frames = _CLIPS[size % len(_CLIPS)][0]
    clip.ids = []
    for frame in range(frames):
        clip.ids += [FIRST_TEXT + frame, VISION_START, *[VIDEO] * (clip.tokens // frames), VISION_END]
    return clip


def _internvl_config() -> Any:
    from transformers import InternVLConfig

    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": [32, 32],
        "patch_size": [4, 4],
    }
    return InternVLConfig(
        vision_config=vision, text_config={"model_type": "qwen2", **TEXT}, image_token_id=IMAGE, image_seq_length=16
    )


def _internvl_image(size: int, generator: torch.Generator) -> Pixels:
    tiles = 1 + size % 3
    return Pixels(16 * tiles, {"pixel_values": _random(generator, tiles, 3, 32, 32)}, ([VISION_START], [VISION_END]))


def _smolvlm_config() -> Any:
    from transformers import SmolVLMConfig

    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 4,
    }
    return SmolVLMConfig(
        vision_config=vision,
        text_config={"model_type": "llama", **TEXT},
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=PAD,
    )


def _smolvlm_image(size: int, generator: torch.Generator) -> Pixels:
    return Pixels(16, {"pixel_values": _random(generator, 1, 3, 32, 32)}, ([VISION_START], [VISION_START]))


def _join_smolvlm(samples: list[list[Pixels]], kind: str) -> dict[str, torch.Tensor]:
    most = max(map(len, samples))
    out = torch.zeros(len(samples), most, 3, 32, 32)
    for i, sample in enumerate(samples):
        for j, pixels in enumerate(sample):
            out[i, j] = pixels.data["pixel_values"][0]
    return {"pixel_values": out}


FAMILIES = {
    family.name: family
    for family in (
        Family("llava", _llava_config, _llava_image),
        Family("llava_next", _llava_next_config, lambda s, g: _anyres_image(_llava_next_config, s, g)),
        Family(
            "llava_onevision",
            _onevision_config,
            lambda s, g: _anyres_image(_onevision_config, s, g),
            _onevision_video,
            _join_onevision,
        ),
        Family("qwen2_vl", _qwen2_config, _qwen_image, _qwen_video, needs_types=True),
        Family("qwen2_5_vl", _qwen2_5_config, _qwen_image, _qwen_video, needs_types=True),
        Family("qwen3_vl", _qwen3_config, _qwen_image, _qwen3_video, needs_types=True),
        Family("internvl", _internvl_config, _internvl_image),
        Family("smolvlm", _smolvlm_config, _smolvlm_image, join=_join_smolvlm),
    )
}
