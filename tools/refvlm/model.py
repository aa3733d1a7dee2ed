# SPDX-License-Identifier: Apache-2.0
"""Builds the untrained LLaVA, its word-level tokenizer and its processor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from vtprune.refvlm import CHAT_TEMPLATE, IMAGE_SIZE, PATCH_SIZE
from vtprune.refvlm.scenes import COLORS, DIGITS, HORIZONTAL, NUMBERS, SHAPES, SIZES, VERTICAL

SPECIAL = ("<pad>", "<unk>", "<bos>", "<eos>", "<image>")
# Words that mark patches in the dense loss of training; `center` marks the one patch at an object's middle.
MARKS = ("background", "center")
QUESTION_WORDS = (
    "circles rectangles triangles stars crosses signs shapes objects object yes no what color colour of the is shape "
    "size or where how many are there a an in image does contain not present digit number on describe list and it this "
    "that which picture scene see do you can any ? , . : answer"
)
WORDS = (
    *COLORS,
    *SHAPES,
    *SIZES,
    *VERTICAL,
    *HORIZONTAL,
    *DIGITS,
    *NUMBERS,
    *MARKS,
    *QUESTION_WORDS.split(),
)
VOCABULARY = {word: index for index, word in enumerate(dict.fromkeys((*SPECIAL, *WORDS)))}


def tokenizer(
    vocabulary: dict[str, int] = VOCABULARY, special: Sequence[str] = (), length: int = 1024
) -> PreTrainedTokenizerFast:
    """Lower-cased words and single punctuation marks; what it does not know becomes `<unk>`.

    Args:
        vocabulary: Id of each word, those of this module included.
        special: Words that mark something, besides `<image>`.
        length: Longest prompt in tokens.
    """
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    # Each digit is a word of its own: "47" is read as "4" and "7".
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[^\W\d_]+|\d|[^\w\s]|_"), behavior="removed", invert=True)
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", VOCABULARY["<bos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=["<image>", *special],
        padding_side="left",
        model_max_length=length,
        clean_up_tokenization_spaces=False,
    )


def processor() -> LlavaProcessor:
    """Stock LLaVA processor that squashes any picture to 144 x 144 and expands `<image>` to 144 tokens."""
    from transformers import CLIPImageProcessor

    images = CLIPImageProcessor(
        do_resize=True,
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        do_center_crop=False,
        do_convert_rgb=True,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer(),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def config() -> LlavaConfig:
    """4 of 5 CLIP layers feed the projector, as in LLaVA; 6 Llama layers with 6 query and 2 key-value heads."""
    ids = {f"{name}_token_id": VOCABULARY[f"<{name}>"] for name in ("pad", "bos", "eos")}
    vision = CLIPVisionConfig(
        hidden_size=160,
        intermediate_size=480,
        projection_dim=160,
        num_hidden_layers=5,
        num_attention_heads=5,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        hidden_act="gelu",
    )
    text = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=192,
        intermediate_size=448,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        **ids,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=VOCABULARY["<image>"],
        image_token_id=VOCABULARY["<image>"],
        projector_hidden_act="gelu",
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
        tie_word_embeddings=True,
        **ids,
    )


def build(seed: int) -> LlavaForConditionalGeneration:
    """The untrained model. Word vectors start with length one, so that patch features can be compared with them."""
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config())
    table = model.get_input_embeddings().weight
    torch.nn.init.normal_(table, std=table.shape[1] ** -0.5)
    model.generation_config.max_new_tokens = 64  # enough for "describe the image"; answers end by themselves
    model.generation_config.do_sample = False
    for name in ("pad", "bos", "eos"):
        setattr(model.generation_config, f"{name}_token_id", VOCABULARY[f"<{name}>"])
    return model
