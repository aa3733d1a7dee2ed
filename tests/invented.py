# SPDX-License-Identifier: Apache-2.0
"""A made-up vision-language model with unfamiliar names: `photo` for the pixels, `retina` for the vision tower.

It represents a model of a later transformers version, and follows only the conventions that generation and caches rely
on: `input_ids`, `attention_mask`, `past_key_values` and the registry of attention functions. Its variants cannot be
pruned.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

PLACEHOLDER, WORDS, SIDE = 3, 61, 4


class MarulkConfig(PretrainedConfig):
    """Sizes, and the `variant`: the property that prevents pruning, or none."""

    model_type = "marulk"

    def __init__(self, variant: str = "", **kwargs: Any) -> None:
        self.variant = variant
        self.hidden_size, self.num_hidden_layers, self.num_attention_heads = 32, 4, 4
        self.intermediate_size, self.vocab_size = 48, WORDS
        if variant != "no placeholder":
            self.image_token_id = PLACEHOLDER
        super().__init__(**kwargs)


class Notion(nn.Module):
    """A decoder layer: attention and an MLP."""

    def __init__(self, config: MarulkConfig, number: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.config, self.number, self.layer_idx = config, number, number
        self.is_causal, self.num_key_value_groups = True, 1
        self.calm, self.ask, self.answer = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.bend = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 48), nn.GELU(), nn.Linear(48, width))

    def forward(
        self, thought: Tensor, turn: tuple[Tensor, Tensor], attention_mask: Any = None, past_key_values: Any = None
    ) -> Tensor:
        batch, length, width = thought.shape
        shaped = self.ask(self.calm(thought)).view(batch, length, 3, self.config.num_attention_heads, -1)
        query, key, value = shaped.permute(2, 0, 3, 1, 4)  # [B, H, T, dh] each
        query, key = (_turned(x, *turn) for x in (query, key))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.number)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, sdpa_attention_forward)
        attended, _ = attend(self, query, key, value, attention_mask, dropout=0.0, scaling=query.shape[-1] ** -0.5)
        thought = thought + self.answer(attended.reshape(batch, length, width))
        return thought + self.bend(thought)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    one, two = x.chunk(2, -1)
    return torch.cat([one * cos[:, None] - two * sin[:, None], two * cos[:, None] + one * sin[:, None]], -1)


class Marulk(PreTrainedModel):
    """Base class of all parts."""

    config_class = MarulkConfig
    base_model_prefix = "whole"
    _supports_sdpa = True
    _supports_attention_backend = True
    config: MarulkConfig


class MarulkMind(Marulk):
    """The language model."""

    def __init__(self, config: MarulkConfig) -> None:
        super().__init__(config)
        self.lexicon = nn.Embedding(config.vocab_size, config.hidden_size)
        self.notions = nn.ModuleList(Notion(config, i) for i in range(config.num_hidden_layers))
        if config.variant == "fused":
            self.retina, self.lens = _retina(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.lexicon

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        photo: Tensor | None = None,
    ) -> BaseModelOutputWithPast:
        thought = self.lexicon(input_ids) if inputs_embeds is None else inputs_embeds
        if photo is not None and self.config.variant == "fused":
            seen = self.lens(self.retina(photo).flatten(2).mT)
            thought = thought.masked_scatter((input_ids == PLACEHOLDER)[..., None], seen)
        if use_cache is not False and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        if position_ids is None:
            position_ids = (torch.arange(thought.shape[1]) + past).expand(thought.shape[0], -1)
        mask = create_causal_mask(self.config, thought, attention_mask, past_key_values, position_ids)
        angle = position_ids[..., None] / 30.0 ** torch.linspace(0, 1, 4)
        turn = angle.cos(), angle.sin()
        for notion in self.notions:
            run = notion.forward if self.config.variant == "layers not called" else notion
            thought = run(thought, turn, attention_mask=mask, past_key_values=past_key_values)
        return BaseModelOutputWithPast(last_hidden_state=thought, past_key_values=past_key_values)


def _retina(config: MarulkConfig) -> tuple[nn.Module, nn.Module]:
    grid, lens = nn.Sequential(nn.Conv2d(3, 24, SIDE, SIDE), nn.GELU()), nn.Linear(24, config.hidden_size)
    return (Eyeball(config, grid) if config.variant == "fused" else grid), lens


class Eyeball(Marulk):
    """A vision tower that declares its main input."""

    main_input_name = "pixel_values"

    def __init__(self, config: MarulkConfig, grid: nn.Module) -> None:
        super().__init__(config)
        self.grid = grid
        self.post_init()

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.grid(pixel_values)


class MarulkWhole(Marulk):
    """Vision tower and language model: features replace the placeholders."""

    def __init__(self, config: MarulkConfig) -> None:
        super().__init__(config)
        self.retina, self.lens = _retina(config)
        self.mind = MarulkMind(config)
        self.glance = nn.Linear(config.hidden_size, config.hidden_size)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.mind.lexicon

    def forward(
        self, input_ids: Tensor, photo: Tensor | None = None, attention_mask: Tensor | None = None, **rest: Any
    ) -> BaseModelOutputWithPast:
        thought = self.mind.lexicon(input_ids)
        if photo is not None:
            seen = self.lens(self.retina(photo).flatten(2).mT)  # [P, N, D]
            here = input_ids == PLACEHOLDER
            if self.config.variant in ("no placeholder", "lengthens"):
                thought = torch.cat([seen, thought[:, 1:]], 1)
                attention_mask = None
            elif self.config.variant == "sideways":
                thought = thought + self.glance(seen).mean(1, keepdim=True)
            else:
                thought = thought.masked_scatter(here[..., None], seen)
        return self.mind(inputs_embeds=thought, attention_mask=attention_mask, **rest)


class MarulkSpeaks(Marulk, GenerationMixin):
    """The complete model, with a language-modeling head."""

    def __init__(self, config: MarulkConfig) -> None:
        super().__init__(config)
        self.whole = MarulkMind(config) if config.variant == "fused" else MarulkWhole(config)
        self.mouth = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.whole.get_input_embeddings()

    def forward(
        self, input_ids: Tensor, photo: Tensor | None = None, attention_mask: Tensor | None = None, **rest: Any
    ) -> CausalLMOutputWithPast:
        if "cache" in rest:  # the name from transformers 5.24 on
            rest["past_key_values"] = rest.pop("cache")
        rest = {name: value for name, value in rest.items() if name in ("position_ids", "past_key_values", "use_cache")}
        out = self.whole(input_ids, photo=photo, attention_mask=attention_mask, **rest)
        return CausalLMOutputWithPast(logits=self.mouth(out.last_hidden_state), past_key_values=out.past_key_values)

    def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        if cache is not None and cache.get_seq_length() > 0:
            inputs.pop("photo", None)
        return inputs


def build(variant: str = "") -> MarulkSpeaks:
    """A small random model."""
    torch.manual_seed(0)
    model = MarulkSpeaks._from_config(MarulkConfig(variant), attn_implementation="sdpa").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.5 if "lexicon" in name or "retina" in name else 0.2)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    model.generation_config.suppress_tokens = [PLACEHOLDER]
    return model


def batch(tokens: int = 16) -> dict[str, Tensor]:
    """Two prompts, the second left-padded, each with `tokens` placeholders and a picture of 16 tokens."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for before, after in ((3, 6), (2, 4)):
        text = torch.randint(8, WORDS, (before + after,), generator=generator).tolist()
        rows.append([*text[:before], *[PLACEHOLDER] * tokens, *text[before:]])
    length = max(map(len, rows))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    photo = torch.randn(2, 3, 4 * SIDE, 4 * SIDE, generator=generator)
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "photo": photo}
