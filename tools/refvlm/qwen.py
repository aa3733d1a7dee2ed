# SPDX-License-Identifier: Apache-2.0
"""The earlier, six-layer Qwen2.5-VL with 81 to 144 visual tokens, which initializes the built-in one.

It shares vocabulary, prompts and decoder widths with the LLaVA, and its training starts from that decoder.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from vtprune.refvlm import CHAT_TEMPLATE
from vtprune.refvlm.qwen import MERGE_SIZE, PATCH_SIZE, PictureProcessor

WINDOW = 48  # pixels: windows of 4 x 4 visual tokens
# Other pictures are resized with their aspect ratio: about 81 to 144 visual tokens.
MIN_PIXELS, MAX_PIXELS = 108 * 108, 144 * 144


def processor(
    tokenizer: PreTrainedTokenizerFast, pixels: tuple[int, int] = (MIN_PIXELS, MAX_PIXELS)
) -> PictureProcessor:
    """The processor of the Qwen models.

    Args:
        tokenizer: tokenizer of the first model, or one with more words.
        pixels: smallest and largest number of pixels; other pictures are resized.
    """
    from transformers import Qwen2VLImageProcessorPil

    images = Qwen2VLImageProcessorPil(
        patch_size=PATCH_SIZE,
        temporal_patch_size=2,
        merge_size=MERGE_SIZE,
        size={"shortest_edge": pixels[0], "longest_edge": pixels[1]},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return PictureProcessor(images, tokenizer, CHAT_TEMPLATE)


def narrow_config(
    vocabulary: dict[str, int], vision: dict[str, Any], text: dict[str, Any], **tokens: int
) -> Qwen2_5_VLConfig:
    """Config with a tower of 4 narrow blocks, and a decoder with 6 query and 2 key-value heads.

    Args:
        vocabulary: word to id, with `<pad>`, `<bos>`, `<eos>` and `<image>`.
        vision, text: further settings of tower and decoder.
        tokens: ids of the tokens of clips and of the tags around pictures.
    """
    ids = {f"{name}_token_id": vocabulary[f"<{name}>"] for name in ("pad", "bos", "eos")}
    tower = {
        "depth": 4,
        "hidden_size": 128,
        "intermediate_size": 320,
        "num_heads": 4,
        "patch_size": PATCH_SIZE,
        "spatial_merge_size": MERGE_SIZE,
        "temporal_patch_size": 2,
    }
    decoder = {
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
        "tie_word_embeddings": True,
        **ids,
    }
    return Qwen2_5_VLConfig(
        vision_config=tower | vision,
        text_config=decoder | text,
        image_token_id=vocabulary["<image>"],
        tie_word_embeddings=True,
        **tokens,
        **ids,
    )


def set_generation(model: Qwen2_5_VLForConditionalGeneration, vocabulary: dict[str, int]) -> None:
    """Sets greedy decoding of at most 64 tokens."""
    model.generation_config.max_new_tokens = 64
    model.generation_config.do_sample = False
    for name in ("pad", "bos", "eos"):
        setattr(model.generation_config, f"{name}_token_id", vocabulary[f"<{name}>"])


def config(vocabulary: dict[str, int]) -> Qwen2_5_VLConfig:
    """Config with 6 decoder layers and two windowed vision blocks."""
    size = len(vocabulary)
    vision = {"window_size": WINDOW, "fullatt_block_indexes": [1, 3], "out_hidden_size": 192}
    text = {
        "vocab_size": size + 3,  # ids of the tokens for videos and tags, which have no word
        "hidden_size": 192,
        "intermediate_size": 448,
        "num_hidden_layers": 6,
        "max_position_embeddings": 1024,
    }
    marks = {"vision_start_token_id": size + 1, "vision_end_token_id": size + 2}
    return narrow_config(vocabulary, vision, text, video_token_id=size, **marks)


def build(seed: int, vocabulary: dict[str, int], first: Any) -> Qwen2_5_VLForConditionalGeneration:
    """The model with an untrained vision side, and with word vectors and decoder layers of the first model, `first`.

    The two decoders differ in rotary embedding (M-RoPE) and in the biases, which start at zero.
    """
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config(vocabulary))
    decoder: Any = model.model.language_model
    learned = dict(first.model.language_model.state_dict())
    words = learned.pop("embed_tokens.weight")
    with torch.no_grad():
        decoder.embed_tokens.weight.zero_()[: len(words)] = words
    missing, unexpected = decoder.load_state_dict(learned, strict=False)
    if unexpected or any(not name.endswith(".bias") and "embed_tokens" not in name for name in missing):
        raise RuntimeError(f"the first model's decoder does not fit: missing {missing}, unexpected {unexpected}")
    set_generation(model, vocabulary)
    return model
