# SPDX-License-Identifier: Apache-2.0
"""Tiny models with random weights in folders that vLLM can serve: weights, tokenizer, processor, chat template."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

WORDS = [f"word{i}" for i in range(60)]
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 2048,
}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4}
TEMPLATE = (
    "{% for message in messages %}{{ message.role }} : {% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }} {% else %}<image>"
    "{% endif %}{% endfor %}{% endif %}\n{% endfor %}assistant :"
)


def tokenizer(*special: str) -> Any:
    """A word-level tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = ["<pad>", "<bos>", "<eos>", "<unk>", *special, "\n", "user", "assistant", ":", *WORDS]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="<unk>"))
    # Spaces separate words; a newline is a word.
    newline, space = (pre_tokenizers.Split(text, how) for text, how in (("\n", "isolated"), (" ", "removed")))
    inner.pre_tokenizer = pre_tokenizers.Sequence([newline, space])
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, additional_special_tokens=list(special), chat_template=TEMPLATE, **names
    )


def idefics3(folder: Path, kind: str = "Idefics3") -> None:
    """An Idefics3 or SmolVLM: 32 x 32 pixels are 16 tokens; larger pictures are tiles with tags, and a thumbnail."""
    import transformers

    tags = [f"<row_{r}_col_{c}>" for r in range(1, 4) for c in range(1, 4)]
    words = tokenizer("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *tags)
    ids = {f"{name}_token_id": getattr(words, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    config = getattr(transformers, f"{kind}Config")(
        vision_config={**VISION, "image_size": 32},
        text_config={"model_type": "llama", "vocab_size": len(words), "tie_word_embeddings": False, **TEXT, **ids},
        image_token_id=words.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=words.pad_token_id,
    )
    pictures = getattr(transformers, f"{kind}ImageProcessor")(
        size={"longest_edge": 96}, max_image_size={"longest_edge": 32}
    )
    extra = {} if kind == "Idefics3" else {"video_processor": transformers.SmolVLMVideoProcessor()}
    processor = getattr(transformers, f"{kind}Processor")(
        image_processor=pictures, tokenizer=words, image_seq_len=16, chat_template=TEMPLATE, **extra
    )
    save(folder, getattr(transformers, f"{kind}ForConditionalGeneration"), config, processor)


def paligemma(folder: Path) -> None:
    """A PaliGemma: every picture is 64 tokens. vLLM is causal on the CPU, and so is the config."""
    from transformers import (
        PaliGemmaConfig,
        PaliGemmaForConditionalGeneration,
        PaliGemmaProcessor,
        SiglipImageProcessor,
    )

    words = tokenizer("<image>")
    words.add_bos_token = False
    vision = {**VISION, "image_size": 32, "projection_dim": 64, "vision_use_head": False}
    ids = {f"{name}_token_id": getattr(words, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    config = PaliGemmaConfig(
        vision_config={"model_type": "siglip_vision_model", **vision},
        text_config={
            "model_type": "gemma",
            "vocab_size": len(words) + 1024 + 128,
            "use_bidirectional_attention": False,
            **TEXT,
            **ids,
        },
        image_token_index=words.convert_tokens_to_ids("<image>"),
        projection_dim=64,
        hidden_size=64,
    )
    pictures = SiglipImageProcessor(size={"height": 32, "width": 32})
    pictures.image_seq_length = 64
    processor = PaliGemmaProcessor(image_processor=pictures, tokenizer=words)
    save(folder, PaliGemmaForConditionalGeneration, config, processor)
    published_names(folder)


def published_names(folder: Path) -> None:
    """Renames weights as in published checkpoints, which vLLM requires; transformers writes other names."""
    weights = load_file(folder / "model.safetensors")
    known = {re.sub(r"vision_tower\.(?!vision_model)", "vision_tower.vision_model.", k): v for k, v in weights.items()}
    save_file(known, folder / "model.safetensors", metadata={"format": "pt"})


def save(folder: Path, cls: Any, config: Any, processor: Any) -> None:
    torch.manual_seed(0)
    model = cls(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # larger weights, so that different pictures get different answers
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
        if config.get_text_config().tie_word_embeddings:  # otherwise every token would predict itself
            model.get_input_embeddings().weight.mul_(0.1)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


MODELS: dict[str, Callable[[Path], None]] = {
    "idefics3": idefics3,
    "smolvlm": lambda folder: idefics3(folder, "SmolVLM"),
    "paligemma": paligemma,
}
