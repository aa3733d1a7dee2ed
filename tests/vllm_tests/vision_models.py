# SPDX-License-Identifier: Apache-2.0
"""Tiny models whose classes in vLLM import torchvision: LLaVA, InternVL, Qwen2.5-VL, Qwen3-VL."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from vllm_tests.models import TEXT, VISION, published_names, save, tokenizer

SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def llava(folder: Path) -> None:
    """A LLaVA-1.5: every picture is 64 tokens."""
    from transformers import CLIPImageProcessor, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    words = tokenizer("<image>")
    size = {"height": 32, "width": 32}
    config = LlavaConfig(
        vision_config={
            "model_type": "clip_vision_model",
            "image_size": 32,
            "projection_dim": 32,
            **VISION,
            "num_hidden_layers": 3,
        },
        text_config={"model_type": "llama", "vocab_size": len(words), "tie_word_embeddings": False, **TEXT, **SPECIAL},
        image_token_index=words.convert_tokens_to_ids("<image>"),
        image_seq_length=64,
    )
    pictures = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size)
    processor = LlavaProcessor(
        image_processor=pictures,
        tokenizer=words,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    save(folder, LlavaForConditionalGeneration, config, processor)
    published_names(folder)


def internvl(folder: Path) -> None:
    """An InternVL as transformers has it: tiles of 16 tokens, and a thumbnail."""
    from transformers import (
        GotOcr2ImageProcessor,
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLProcessor,
        InternVLVideoProcessor,
    )

    words = tokenizer("<IMG_CONTEXT>", "<img>", "</img>", "<video>")
    names = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    names |= {"video_token": "<video>"}
    for name, token in names.items():
        setattr(words, name, token)
        setattr(words, f"{name}_id", words.convert_tokens_to_ids(token))
        words.init_kwargs[name] = token
    size = {"height": 32, "width": 32}
    config = InternVLConfig(
        vision_config={**VISION, "image_size": [32, 32], "patch_size": [4, 4]},
        text_config={"model_type": "qwen2", "vocab_size": len(words), "tie_word_embeddings": False, **TEXT, **SPECIAL},
        image_token_id=words.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=16,
    )
    pictures = GotOcr2ImageProcessor(size=size, crop_to_patches=True, min_patches=1, max_patches=6)
    processor = InternVLProcessor(
        image_processor=pictures,
        tokenizer=words,
        video_processor=InternVLVideoProcessor(size=size),
        image_seq_length=16,
    )
    save(folder, InternVLForConditionalGeneration, config, processor)


def mistral3(folder: Path) -> None:
    """A Mistral 3: 8 x 8 pixels per token, row by row, with a token after each row."""
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration, PixtralImageProcessor, PixtralProcessor

    words = tokenizer("[IMG]", "[IMG_BREAK]", "[IMG_END]")
    config = Mistral3Config(
        vision_config={"model_type": "pixtral", **VISION, "image_size": 96, "head_dim": 16},
        text_config={
            "model_type": "mistral",
            "vocab_size": len(words),
            "tie_word_embeddings": False,
            **TEXT,
            **SPECIAL,
        },
        image_token_index=words.convert_tokens_to_ids("[IMG]"),
        spatial_merge_size=2,
        vision_feature_layer=-1,
    )
    patch = {"height": 4, "width": 4}
    pictures = PixtralImageProcessor(size={"longest_edge": 96}, patch_size=patch)
    processor = PixtralProcessor(image_processor=pictures, tokenizer=words, patch_size=4, spatial_merge_size=2)
    save(folder, Mistral3ForConditionalGeneration, config, processor)


def qwen2_5_vl(folder: Path) -> None:
    """A Qwen2.5-VL with 8 x 8 pixels per token."""
    vision = {"window_size": 16, "fullatt_block_indexes": [1]}
    qwen(folder, "Qwen2_5_VL", vision, {"mrope_section": [4, 6, 6]})


def qwen3_vl(folder: Path) -> None:
    """A Qwen3-VL; features of its first two vision layers are added in the first two decoder layers (DeepStack)."""
    vision = {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1], "depth": 3}
    qwen(folder, "Qwen3VL", vision, {"mrope_section": [6, 5, 5], "mrope_interleaved": True})


def qwen3_vl_moe(folder: Path) -> None:
    """A Qwen3-VL whose decoder is a mixture of experts."""
    vision = {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1], "depth": 3}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
    experts["norm_topk_prob"] = True  # as in published checkpoints, and the only option in transformers
    qwen(folder, "Qwen3VLMoe", vision, {"mrope_section": [6, 5, 5], "mrope_interleaved": True}, experts)
    # vLLM reads expert weights in the published, transposed layout, but transformers writes its own.
    weights = load_file(folder / "model.safetensors")
    published = {k: v.transpose(1, 2).contiguous() if ".experts." in k else v for k, v in weights.items()}
    shutil.copytree(folder, folder / "published")
    save_file(published, folder / "published" / "model.safetensors", metadata={"format": "pt"})


def qwen3_5(folder: Path) -> None:
    """A Qwen3.5: two layers of linear attention and one of attention, in a Qwen3-VL without DeepStack."""
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_conv_kernel_dim": 4}
    linear |= {"linear_key_head_dim": 128, "linear_value_head_dim": 128}
    linear["layer_types"] = ["linear_attention", "linear_attention", "full_attention"]
    rope = {"mrope_section": [6, 5, 5], "mrope_interleaved": True, "partial_rotary_factor": 1.0}
    qwen(folder, "Qwen3_5", {"num_position_embeddings": 64}, rope, linear)


def qwen(folder: Path, kind: str, vision: dict[str, Any], rope: dict[str, Any], more: dict | None = None) -> None:
    """Writes a Qwen-VL of `kind` with its settings of tower and rotary embedding."""
    import transformers

    names = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
    names |= {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    words = tokenizer(*names.values())
    tower = {"depth": 2, "num_heads": 2, "patch_size": 4, **vision}
    if kind != "Qwen2VL":
        tower |= {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64}
    ids = {name: words.convert_tokens_to_ids(token) for name, token in names.items()}
    rope = {"rope_type": "default", "rope_theta": 10000.0, **rope}
    text = {"vocab_size": len(words), "tie_word_embeddings": False, "rope_parameters": rope, **TEXT, **SPECIAL}
    text |= more or {}
    config = getattr(transformers, f"{kind}Config")(
        vision_config=tower, text_config=text, tie_word_embeddings=False, **ids
    )
    # Clips and pictures are normalized equally, as in published checkpoints: vLLM uses the same values for both.
    grid = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    pixels = {"shortest_edge": 8 * 8, "longest_edge": 96 * 96}
    reader = "Qwen3VL" if kind.startswith("Qwen3") else kind
    videos = transformers.Qwen3VLVideoProcessor if reader == "Qwen3VL" else transformers.Qwen2VLVideoProcessor
    processor = getattr(transformers, f"{reader}Processor")(
        image_processor=transformers.Qwen2VLImageProcessor(size=pixels, **grid),
        tokenizer=words,
        video_processor=videos(size=pixels, **grid),
        chat_template=words.chat_template,
    )
    save(folder, getattr(transformers, f"{kind}ForConditionalGeneration"), config, processor)
