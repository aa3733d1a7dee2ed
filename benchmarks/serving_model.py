# SPDX-License-Identifier: Apache-2.0
"""A random Idefics3 for `benchmarks.serving`, small enough for a CPU; times do not depend on weights.

Its proportions are those of large models: 832 visual tokens from 13 tiles, and nearly all operations in the decoder (in
LLaVA-1.5-7B, too, the vision tower has 4 % of them).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

WORDS = 2000
TILE, ROWS, COLUMNS = 64, 3, 4
SIZE = (TILE * COLUMNS, TILE * ROWS)  # width and height of 3 x 4 tiles, without the thumbnail
TEXT = {
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1792,
    "num_hidden_layers": 10,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
VISION = {
    "hidden_size": 160,
    "intermediate_size": 640,
    "num_hidden_layers": 4,
    "num_attention_heads": 5,
    "patch_size": 8,
    "image_size": TILE,
}
_TEMPLATE = (
    "{% for message in messages %}{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{% if part.type == 'text' %} {{ part.text }}{% else %}<image>{% endif %}"
    "{% endfor %}{% endif %}{% endfor %}"
)


def config() -> Any:
    """The transformers config, without token ids."""
    from transformers import Idefics3Config

    return Idefics3Config(vision_config=dict(VISION), text_config=dict(TEXT), scale_factor=1)


def build(folder: Path) -> Path:
    """Saves the model with tokenizer, image processor and chat template for `vllm serve`."""
    import torch
    from transformers import Idefics3ForConditionalGeneration, Idefics3ImageProcessor, Idefics3Processor

    words = _tokenizer()
    made = config()
    made.text_config.vocab_size = len(words)
    ids = {f"{name}_token_id": getattr(words, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    for part in (made, made.text_config):
        part.update(ids)
    made.image_token_id = words.convert_tokens_to_ids("<image>")
    torch.manual_seed(0)
    Idefics3ForConditionalGeneration(made).float().save_pretrained(folder)
    pictures = Idefics3ImageProcessor(size={"longest_edge": SIZE[0]}, max_image_size={"longest_edge": TILE})
    tokens = (TILE // VISION["patch_size"]) ** 2
    processor = Idefics3Processor(
        image_processor=pictures, tokenizer=words, image_seq_len=tokens, chat_template=_TEMPLATE
    )
    processor.save_pretrained(folder)
    return folder


def about() -> dict[str, Any]:
    """Conditions that must be equal for results with this model to be comparable."""
    return {"text": TEXT, "vision": VISION}


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tags = [f"<row_{row}_col_{column}>" for row in range(1, ROWS + 1) for column in range(1, COLUMNS + 1)]
    special = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *tags]
    known = ["<pad>", "<bos>", "<eos>", "<unk>", *special, "\n", *(f"word{i}" for i in range(WORDS))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="<unk>"))
    newline, space = (pre_tokenizers.Split(text, how) for text, how in (("\n", "isolated"), (" ", "removed")))
    inner.pre_tokenizer = pre_tokenizers.Sequence([newline, space])
    names = {f"{name}_token": f"<{name}>" for name in ("pad", "bos", "eos", "unk")}
    return PreTrainedTokenizerFast(tokenizer_object=inner, additional_special_tokens=special, **names)
