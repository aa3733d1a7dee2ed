# SPDX-License-Identifier: Apache-2.0
"""A stock LLaVA around a real decoder whose "picture" is a text: every visual token is the vector of one of its words.

Nothing has to be trained: the decoder reads the visual tokens as it reads words, and what it can answer about them is
known. The vision tower looks word vectors up, and the projector passes them on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import PreTrainedModel

from . import parts

PLACEHOLDER = "<repo_name>"  # a word that SmolLM2 reserves and these texts do not contain


class WordTower(PreTrainedModel):
    """Turns the "pixels" of a text, its token ids `[B, 1, 1, N]`, into their word vectors `[B, N, D]`."""

    config_class = CLIPVisionConfig
    main_input_name = "pixel_values"
    _supports_sdpa = True

    def __init__(self, config: CLIPVisionConfig, words: nn.Embedding):
        super().__init__(config)
        self.patch_embedding = nn.Embedding(1, 1)  # this tower's own; the word vectors belong to the decoder
        self._words = [words]

    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPooling:
        vectors = self._words[0](pixel_values[:, 0, 0].long())
        return BaseModelOutputWithPooling(last_hidden_state=vectors, hidden_states=(vectors, vectors))


def load(dtype: torch.dtype = torch.float32) -> LlavaForConditionalGeneration:
    """Loads the model in eval mode."""
    decoder = parts.decoder(dtype)
    vision = CLIPVisionConfig(
        hidden_size=decoder.config.hidden_size, num_hidden_layers=1, num_attention_heads=9, intermediate_size=8,
        image_size=8, patch_size=8,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision,
        text_config=decoder.config,
        image_token_id=parts.tokenizer().convert_tokens_to_ids(PLACEHOLDER),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    model.model.language_model = decoder.model
    model.lm_head = decoder.lm_head
    model.model.vision_tower = WordTower(vision, decoder.model.embed_tokens)
    model.model.multi_modal_projector = nn.Linear(vision.hidden_size, vision.hidden_size, bias=False, dtype=dtype)
    nn.init.eye_(model.model.multi_modal_projector.weight)
    model.generation_config = decoder.generation_config
    return model.eval()


def inputs(before: str, words: list[list[int]], after: list[str]) -> dict[str, Tensor]:
    """Arguments of `forward` and `generate`.

    Args:
        before: text before every picture.
        words: the token ids of every picture, equally many.
        after: the text after every picture; shorter ones are padded on the left.
    """
    tokenizer = parts.tokenizer()
    place = tokenizer.convert_tokens_to_ids(PLACEHOLDER)
    head = tokenizer(before, add_special_tokens=False)["input_ids"]
    rows = [
        [*head, *[place] * len(ids), *tokenizer(text, add_special_tokens=False)["input_ids"]]
        for ids, text in zip(words, after, strict=True)
    ]
    longest = max(map(len, rows))
    padded = [[tokenizer.pad_token_id] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return {
        "input_ids": torch.tensor(padded),
        "attention_mask": torch.tensor(mask),
        "pixel_values": torch.tensor(words, dtype=torch.float64)[:, None, None].float(),
    }
