# SPDX-License-Identifier: Apache-2.0
"""Named architectures with random weights, to measure speed without a download.

Times depend on the sizes of a model, not on its weights. Sizes are those of the published configurations, and the
models are built from the classes of transformers. A `-shallow` architecture has full widths, and equal shares of the
tower's blocks, the decoder's layers and the vocabulary: the parts that vision tower and decoder have in the time to the
first token stay nearly what they are, on a machine that could not hold the whole model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import TYPE_CHECKING, Any

from ..errors import InputError, one_line
from .layouts import AnyRes, Fixed, Grid, Layout, MergedTiles, Tiles

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Shape:
    """An architecture.

    Attributes:
        name: Name on the command line.
        about: Short description.
        config: Function that returns its transformers config.
        layout: Layout of its pictures.
    """

    name: str
    about: str
    config: Callable[[], Any]
    layout: Layout

    def build(
        self, device: torch.device, dtype: torch.dtype, attention: str = "sdpa", seed: int = 0
    ) -> torch.nn.Module:
        """Builds the model in eval mode with random weights, without changing the global random state.

        Args:
            device: Device of the model.
            dtype: Dtype of the weights.
            attention: Attention implementation of transformers.
            seed: Seed of the weights.
        """
        import torch
        from transformers import AutoModelForImageTextToText

        accelerators = [device] if device.type != "cpu" else []
        with torch.random.fork_rng(devices=accelerators, device_type=device.type), torch.device(device):
            torch.manual_seed(seed)
            try:
                model = AutoModelForImageTextToText.from_config(
                    copy.deepcopy(self.config()), dtype=dtype, attn_implementation=attention
                )
            except (ValueError, ImportError) as error:
                raise InputError(f"cannot build the model with attention {attention!r}: {one_line(error)}") from error
        model.generation_config.eos_token_id = None
        return model.to(device).eval()


def get(name: str) -> Shape:
    """Returns the shape of a name.

    Raises:
        InputError: There is no such shape.
    """
    if name not in SHAPES:
        raise InputError(f"no shape {name!r}; expected one of {', '.join(SHAPES)}")
    return SHAPES[name]


def _tower(
    kind: str, width: int, inner: int, layers: int, heads: int, image: int, patch: int, **more: Any
) -> dict[str, Any]:
    """Config of a vision transformer on pictures of `image` pixels."""
    return {
        "model_type": kind,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "image_size": image,
        "patch_size": patch,
        **more,
    }


def _decoder(
    kind: str, vocabulary: int, width: int, inner: int, layers: int, heads: int, groups: int, **more: Any
) -> dict[str, Any]:
    """Config of a decoder with `groups` key-value heads."""
    sizes = {
        "model_type": kind,
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "max_position_embeddings": 16384,
    }
    return sizes | more


def _clip_large() -> dict[str, Any]:
    return _tower("clip_vision_model", 1024, 4096, 24, 16, 336, 14, projection_dim=768)


def _vicuna() -> dict[str, Any]:
    return _decoder("llama", 32064, 4096, 11008, 32, 32, 32)


def _qwen2_7b(kind: str, vocabulary: int, **more: Any) -> dict[str, Any]:
    return _decoder(kind, vocabulary, 3584, 18944, 28, 28, 4, max_position_embeddings=32768, **more)


def _llava() -> Any:
    from transformers import LlavaConfig

    return LlavaConfig(vision_config=_clip_large(), text_config=_vicuna(), image_token_id=32000)


def _llava_next() -> Any:
    from transformers import LlavaNextConfig

    pinpoints = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    return LlavaNextConfig(
        vision_config=_clip_large(), text_config=_vicuna(), image_token_id=32000, image_grid_pinpoints=pinpoints
    )


def _llava_onevision() -> Any:
    from transformers import LlavaOnevisionConfig

    vision = _tower("siglip_vision_model", 1152, 4304, 26, 16, 384, 14, vision_use_head=False)
    return LlavaOnevisionConfig(
        vision_config=vision,
        text_config=_qwen2_7b("qwen2", 152000),
        image_token_id=151646,
        video_token_id=151647,
        image_grid_pinpoints=[[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)],
        vision_aspect_ratio="anyres_max_9",
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )


def _grid_tokens(vocabulary: int) -> dict[str, int]:
    """Ids of a Qwen-VL model's placeholders: the last of the vocabulary, where no prompt has its words."""
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    return {name: vocabulary - len(names) + place for place, name in enumerate(names)}


def _qwen2_5_vl(share: Fraction = Fraction(1)) -> Any:
    from transformers import Qwen2_5_VLConfig

    vocabulary = int(152064 * share)
    vision = {
        "depth": int(32 * share),
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31][: int(4 * share)],
    }
    rope = {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1000000.0}
    text = _qwen2_7b("qwen2_5_vl_text", vocabulary, rope_parameters=rope, bos_token_id=None, eos_token_id=None)
    text["num_hidden_layers"] = int(28 * share)
    return Qwen2_5_VLConfig(vision_config=vision, text_config=text, **_grid_tokens(vocabulary))


def _qwen3_vl(share: Fraction = Fraction(1)) -> Any:
    from transformers import Qwen3VLConfig

    vocabulary = int(151936 * share)
    vision = {
        "depth": int(27 * share),
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_heads": 16,
        "out_hidden_size": 4096,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "deepstack_visual_indexes": [8, 16, 24] if share == 1 else [int(8 * share)],
    }
    rope = {"rope_type": "default", "mrope_section": [24, 20, 20], "rope_theta": 5000000.0}
    more = {"head_dim": 128, "rope_parameters": rope, "max_position_embeddings": 262144}
    text = _decoder("qwen3_vl_text", vocabulary, 4096, 12288, int(36 * share), 32, 8, **more)
    return Qwen3VLConfig(vision_config=vision, text_config=text, **_grid_tokens(vocabulary))


def _internvl3(share: Fraction = Fraction(1)) -> Any:
    from transformers import InternVLConfig

    vocabulary = int(151674 * share)
    vision = _tower("internvl_vision", 1024, 4096, int(24 * share), 16, 448, 14, attention_bias=True)
    text = _qwen2_7b("qwen2", vocabulary) | {"num_hidden_layers": int(28 * share)}
    more = {"image_token_id": vocabulary - 1, "tie_word_embeddings": False}
    return InternVLConfig(vision_config=vision, text_config=text, **more)


def _smolvlm() -> Any:
    from transformers import SmolVLMConfig

    vision = _tower("smolvlm_vision", 768, 3072, 12, 12, 512, 16)
    text = _decoder("llama", 49280, 960, 2560, 32, 15, 5, head_dim=64)
    return SmolVLMConfig(vision_config=vision, text_config=text, scale_factor=4, image_token_id=49190)


def _small() -> Any:
    from transformers import LlavaConfig

    vision = _tower("clip_vision_model", 384, 1536, 12, 6, 384, 16, projection_dim=384)
    text = _decoder("qwen2", 32064, 896, 4864, 24, 14, 2)
    return LlavaConfig(vision_config=vision, text_config=text, image_token_id=32000)


def _tiny() -> Any:
    from transformers import LlavaConfig

    vision = _tower("clip_vision_model", 32, 64, 3, 2, 48, 4, projection_dim=32)
    return LlavaConfig(vision_config=vision, text_config=_decoder("llama", 256, 64, 128, 4, 4, 2), image_token_id=255)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("llava-1.5-7b", "CLIP-L at 336 pixels, 576 tokens a picture; Vicuna 7B", _llava, Fixed()),
        Shape("llava-next-7b", "CLIP-L on tiles of any resolution; Vicuna 7B", _llava_next, AnyRes()),
        Shape("llava-onevision-7b", "SigLIP at 384 pixels, up to 9 tiles; Qwen2 7B", _llava_onevision, AnyRes()),
        Shape("qwen2.5-vl-7b", "native-resolution tower; Qwen2.5 7B with M-RoPE", _qwen2_5_vl, Grid()),
        Shape("qwen3-vl-8b", "native-resolution tower with DeepStack; Qwen3 8B", _qwen3_vl, Grid()),
        Shape(
            "internvl3-8b",
            "InternViT-300M on tiles of 448 pixels, 256 tokens each; Qwen2.5 7B",
            _internvl3,
            MergedTiles(),
        ),
        Shape(
            "qwen2.5-vl-7b-shallow", "a quarter of its depth, for CPUs", partial(_qwen2_5_vl, Fraction(1, 4)), Grid()
        ),
        Shape("qwen3-vl-8b-shallow", "two ninths of its depth, for CPUs", partial(_qwen3_vl, Fraction(2, 9)), Grid()),
        Shape(
            "internvl3-8b-shallow",
            "a quarter of its depth, for CPUs",
            partial(_internvl3, Fraction(1, 4)),
            MergedTiles(),
        ),
        Shape("smolvlm-500m", "SigLIP-B on tiles of 512 pixels, 64 tokens each; SmolLM2 360M", _smolvlm, Tiles()),
        Shape("small", "for CPUs: ViT-S, 576 tokens a picture; a decoder of the size of Qwen2 0.5B", _small, Fixed()),
        Shape("tiny", "to try the command: 144 tokens a picture, 4 layers", _tiny, Fixed()),
    )
}
