# SPDX-License-Identifier: Apache-2.0
"""The earlier Qwen2.5-VL, from which the training of the built-in one begins: six layers, 81 to 144 visual tokens.

It shares words, prompts and decoder widths with the LLaVA, and its training starts from the decoder of that one.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from vtprune.refvlm import CHAT_TEMPLATE
from vtprune.refvlm.qwen import MERGE_SIZE, PATCH_SIZE, PictureProcessor

WINDOW = 48  # pixels: windows of 4 x 4 visual tokens
# Pictures outside are enlarged or reduced, without changing their shape: about 81 to 144 visual tokens.
MIN_PIXELS, MAX_PIXELS = 108 * 108, 144 * 144


def processor(
    tokenizer: PreTrainedTokenizerFast, pixels: tuple[int, int] = (MIN_PIXELS, MAX_PIXELS)
) -> PictureProcessor:
    """A processor of the model's kind.

    Args:
        tokenizer: that of the first model, or one with more words.
        pixels: smaller pictures are enlarged to the first number of pixels, larger ones reduced to the second.
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
    """A tower of 4 narrow blocks, and a decoder with 6 query and 2 key-value heads.

    Args:
        vocabulary: numbers of the words, among them `<pad>`, `<bos>`, `<eos>` and `<image>`.
        vision, text: the other sizes of tower and decoder.
        tokens: numbers of the tokens of clips and of the marks around pictures.
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
    """Greedy answers of at most 64 tokens."""
    model.generation_config.max_new_tokens = 64
    model.generation_config.do_sample = False
    for name in ("pad", "bos", "eos"):
        setattr(model.generation_config, f"{name}_token_id", vocabulary[f"<{name}>"])


def config(vocabulary: dict[str, int]) -> Qwen2_5_VLConfig:
    """Two of the vision blocks have windows; 6 decoder layers."""
    size = len(vocabulary)
    vision = {"window_size": WINDOW, "fullatt_block_indexes": [1, 3], "out_hidden_size": 192}
    text = {
        "vocab_size": size + 3,  # no word is left for the tokens that only videos and other prompts have
        "hidden_size": 192,
        "intermediate_size": 448,
        "num_hidden_layers": 6,
        "max_position_embeddings": 1024,
    }
    marks = {"vision_start_token_id": size + 1, "vision_end_token_id": size + 2}
    return narrow_config(vocabulary, vision, text, video_token_id=size, **marks)


def build(seed: int, vocabulary: dict[str, int], first: Any) -> Qwen2_5_VLForConditionalGeneration:
    """The model with an untrained vision side and the word vectors and decoder layers of the first model, `first`.

    The two decoders differ in how positions turn queries and keys, and in the biases, which start at zero here.
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
