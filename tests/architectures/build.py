# SPDX-License-Identifier: Apache-2.0
"""Builds a small model of any registered architecture from its default config.

No architecture is named here. Settings are recognized by name and value (a width, a number of heads or layers, a list
with one entry per layer, a token id) and replaced by small values, consistently in all parts of the config.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

WIDTH, HEADS, KV_HEADS, HEAD_DIM, INNER = 64, 4, 2, 32, 48
DECODER_LAYERS, OTHER_LAYERS, EXPERTS = 4, 2, 4
VOCAB, FIRST_TEXT = 320, 64
# Sliding window, shorter than a prompt with a single image.
WINDOW = 20


@dataclass
class Ids:
    """Token ids of the small vocabulary.

    Attributes:
        of: Original id to small id; equal ids stay equal.
    """

    of: dict[int, int] = field(default_factory=dict)

    def small(self, value: int | None) -> int:
        """The small id of `value`; each None gets a new id."""
        if value is None:
            value = -1000 - len(self.of)
        if value not in self.of:
            self.of[value] = 3 + len(self.of)
        return self.of[value]


_WIDTHS = re.compile(
    r"^(hidden_size|d_model|n_embd|embed_dim|hidden_dim|hidden_size_per_layer_input|projection_dim|proj_dim|output_dim"
    r"|word_embed_proj_dim|vision_output_dim|image_text_hidden_size|pooler_output_size|adapter_out_dim|adapter_in_dim"
    r"|adapter_input_size|vision_hidden_size|text_hidden_size|out_hidden_size|encoder_hidden_size|decoder_hidden_size"
    r"|image_token_embed_dim|patch_embed_hidden_size|projector_input_dim|projector_output_dim|input_size)$"
)
_INNER = re.compile(
    r"(intermediate_size|ffn_dim|^d_ff$|^mlp_dim$|_expert_dim$|_inner_dim$|projection_hidden_dim|intermediate_dim)"
)
_HEADS = re.compile(
    r"^(.*num_attention_heads|num_heads|attention_heads|(encoder|decoder)_attention_heads|n_head|n_heads|.*_n_heads|.*resampler_heads)$"
)
_KV_HEADS = re.compile(r"num_key_value_heads$|num_kv_heads$|num_attention_groups$")
_LAYERS = re.compile(
    r"^(num_hidden_layers|num_layers|n_layers|n_layer|depth|(num_)?(encoder|decoder)_layers|num_(encoder|decoder)_layers|layers|conf_num_hidden_layers|resampler_depth|num_global_layers)$"
)
_EXPERTS = re.compile(r"^(moe_)?(num_experts|n_routed_experts|num_local_experts|moe_num_experts)$")
_PER_TOKEN = re.compile(r"^(num_experts_per_tok|moe_k|moe_topk|top_k_experts|num_experts_per_token)$")
_ID = re.compile(r"(token_id|token_index|_id|token_ids)$")
_SPECIAL = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}
_EXACT: dict[str, Any] = {
    "head_dim": HEAD_DIM,
    "global_head_dim": HEAD_DIM,
    "swa_head_dim": HEAD_DIM,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "qk_head_dim": 32,
    "v_head_dim": 16,
    "rotary_dim": 16,
    "index_head_dim": 32,
    "index_n_heads": 2,
    "n_group": 1,
    "topk_group": 1,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_heads": 4,
    "linear_head_dim": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "ssm_state_size": 8,
    "n_groups": 2,
    "max_position_embeddings": 512,
    "sliding_window": WINDOW,
    "sliding_window_size": WINDOW,
    "attention_chunk_size": 16,
    "image_seq_length": 16,
    "mm_tokens_per_image": 16,
    "vision_soft_tokens_per_image": 16,
    "num_image_tokens": 16,
    "query_pre_attn_scalar": HEAD_DIM,
    "base_channels": 32,
    "codebook_size": 64,
    "num_embeddings": 64,
    "additional_vocab_size": 0,
}


def shrink(config: dict[str, Any]) -> tuple[dict[str, Any], Ids]:
    """Replaces the sizes in a config with small ones.

    Args:
        config: `PretrainedConfig.to_dict()`.

    Returns:
        tuple: The new settings, and the mapping of token ids.
    """
    ids = Ids()
    alone = not any(isinstance(v, dict) and "model_type" in v for v in config.values())
    return _shrink(config, ids, alone), ids


@dataclass
class _Part:
    """Properties of one (sub-)config on which the small values of its settings depend.

    Attributes:
        config: The original settings.
        text: Whether it describes the decoder.
        layers: Its number of layers, or None.
        sources: For each layer of the small model, the original layer whose type it has.
        heads, width: Original values.
    """

    config: dict[str, Any]
    text: bool
    layers: int | None
    sources: list[int]
    heads: int | None
    width: int | None

    @classmethod
    def of(cls, config: dict[str, Any], text: bool) -> _Part:
        def first(pattern: re.Pattern) -> int | None:
            return next((v for k, v in config.items() if pattern.match(k) and type(v) is int), None)

        layers = first(_LAYERS)
        width = next((config[k] for k in ("hidden_size", "embed_dim", "d_model") if type(config.get(k)) is int), None)
        least = DECODER_LAYERS if text else OTHER_LAYERS
        # One layer of each type found in per-layer lists, in order of first occurrence.
        lists = [v for k, v in config.items() if isinstance(v, (list, tuple)) and len(v) == layers and _per_layer(k)]
        kinds: dict[str, int] = {}
        for i in range(layers or 0):
            kinds.setdefault(str([v[i] for v in lists]), i)
        found = list(kinds.values())[:6] or [0]
        sources = [found[i % len(found)] for i in range(max(least, len(found)))]
        return cls(config, text, layers, sources, config.get("num_attention_heads") or first(_HEADS), width)


def _per_layer(name: str) -> bool:
    return not re.search("index|indices|idx|ids$|pinpoints|_layers$|feature_layer", name) or name == "no_rope_layers"


def _shrink(config: dict[str, Any], ids: Ids, text: bool) -> dict[str, Any]:
    part = _Part.of(config, text)
    out: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict) and "model_type" in value:
            is_text = "text" in name or name in ("decoder", "llm_config", "language_config")
            out[name] = _shrink(value, ids, is_text or (text and "vision" not in name))
        else:
            out[name] = _setting(name, value, part, ids)
    return out


def _setting(name: str, value: Any, part: _Part, ids: Ids) -> Any:
    """The small value of one setting."""
    if name in _SPECIAL:
        return None if value is None and name != "pad_token_id" else _SPECIAL[name]
    if name == "per_layer_config" and isinstance(value, dict):
        by_layer = {
            int(k): {
                n: _setting(n, v, replace(part, heads=new.get("num_attention_heads", part.heads)), ids)
                for n, v in new.items()
            }
            for k, new in value.items()
        }
        return {i: by_layer[source] for i, source in enumerate(part.sources) if source in by_layer}
    if isinstance(value, dict):
        return _mapping(value, part, ids)
    if isinstance(value, bool) or (value is None and not re.search(r"^(image|video)_token_(id|index)$", name)):
        return value
    if _ID.search(name) and not name.startswith("num_"):
        if isinstance(value, (list, tuple)) and all(isinstance(v, int) for v in value):
            return [ids.small(v) for v in value]
        if value is None or isinstance(value, int):
            return ids.small(value)
    if isinstance(value, (list, tuple)):
        return _listed(name, list(value), part)
    return _number(name, value, part) if isinstance(value, int) else value


def _mapping(value: dict[str, Any], part: _Part, ids: Ids) -> dict[str, Any]:
    """Rotary settings, possibly one group per layer type."""
    if "mrope_section" in value:
        share = value.get("partial_rotary_factor", part.config.get("partial_rotary_factor")) or 1
        size = HEAD_DIM if isinstance(part.config.get("head_dim"), int) else WIDTH // HEADS
        if isinstance(part.config.get("qk_rope_head_dim"), int):  # latent attention rotates only this part of a head
            size = _EXACT["qk_rope_head_dim"]
        value = value | {"mrope_section": _sections(value["mrope_section"], int(size * share) // 2)}
    return {k: _setting(k, v, part, ids) if isinstance(v, dict) else v for k, v in value.items()}


def _number(name: str, value: int, part: _Part) -> int:
    if name == "head_dim" and value == part.config.get("qk_rope_head_dim"):
        return _EXACT["qk_rope_head_dim"]
    if name == "head_dim" and not part.text and part.heads and value * part.heads == part.width:
        return WIDTH // HEADS
    if name in _EXACT:
        return min(value, _EXACT[name]) if value > 0 else value
    if name in ("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"):
        return VOCAB if part.text or value > 1000 else value
    if _WIDTHS.match(name):
        return WIDTH
    if _INNER.search(name):
        return INNER
    if _KV_HEADS.search(name):
        return 1 if value == 1 else HEADS if value == part.heads else KV_HEADS
    if _HEADS.match(name):
        return min(value, HEADS)
    if _LAYERS.match(name):
        return len(part.sources)
    if _EXPERTS.match(name):
        return min(value, EXPERTS)
    if _PER_TOKEN.match(name):
        return min(value, 2)
    if name == "codebook_dim" and value == part.config.get("hidden_size"):
        return WIDTH
    if name in ("num_kv_shared_layers", "first_k_dense_replace"):
        return min(value, 1)
    if name == "image_size":
        patch = part.config.get("patch_size")
        return patch * 8 if isinstance(patch, int) else value
    width = part.width
    if width and value in (2 * width, 4 * width, 8 * width) and re.search(r"hidden_size|_dim$|_size$", name):
        return WIDTH * (value // width)
    return value


def _sections(sections: list[int], half: int) -> list[int]:
    """Splits `half` rotary frequencies in proportion to `sections`, at least one per axis if possible."""
    total = sum(sections)
    out = [max(1, s * half // total) for s in sections]
    while sum(out) < half:
        out[out.index(min(out))] += 1
    while sum(out) > half:
        out[out.index(max(out))] -= 1
    return out


def _listed(name: str, value: list[Any], part: _Part) -> list[Any]:
    """Shrinks a list with one entry per layer to the small layers, and a list of layer numbers to existing layers."""
    if part.layers and len(value) == part.layers and _per_layer(name):
        return [value[i] for i in part.sources]
    numbers = bool(value) and all(type(v) is int for v in value)
    if numbers and re.search("index|indices|idx|feature_layer|target_layers|layers$", name):
        count = len(part.sources) if part.layers else OTHER_LAYERS
        if any(v < 0 for v in value):
            return [-1 - (i % count) for i in range(len(value))]
        return list(range(count)) if len(value) == part.layers else list(range(min(len(value), count)))
    return value


@dataclass
class Built:
    """A small model.

    Attributes:
        model: In eval mode, float32, random weights.
        ids: Mapping of token ids.
        notes: Replacements that were necessary to build the model.
    """

    model: nn.Module
    ids: Ids
    notes: list[str] = field(default_factory=list)


# Settings without a default that some models require; any value works.
_MISSING: dict[str, Any] = {
    "head_dim": HEAD_DIM,
    "num_experts_per_tok": 2,
    "mlp_layer_types": ["dense", "sparse"] * (DECODER_LAYERS // 2),
    "vocabulary_map": {"<image>": 3, "<IMGSTART>": 4, "<IMGEND>": 5}
    | {f"IMGIMG{'ABCDEFGHIJ'[i // 10]}{'ABCDEFGHIJ'[i % 10]}Z": 200 + i for i in range(64)},
    "deepstack_layer_map": [[-1, 0], [-2, 1]],
    "downsample_rate": "2/4",
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 32,
    "indexer_budget": 256,
    "indexer_compress_ratio": 4,
}


def _complete(config: dict[str, Any], by_kind: bool, window: bool, text: bool = True) -> dict[str, Any]:
    """Sets values for settings that are None, and adds the rotary settings that the model reads."""
    out = {}
    for name, value in config.items():
        if isinstance(value, dict) and "model_type" in value:
            out[name] = _complete(value, by_kind, window, "vision" not in name and "audio" not in name)
        elif value is None and text and name in _MISSING:
            out[name] = _MISSING[name]
        elif name == "sliding_window" and value is None and text and window:
            out[name] = WINDOW
        elif name == "rope_parameters" and text and isinstance(value, dict):
            size = config.get("head_dim", WIDTH // HEADS) or HEAD_DIM
            share = value.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1
            sections = _sections([22, 22, 20], int(size * share) // 2)
            plain = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections}
            kinds = dict.fromkeys(config.get("layer_types") or ["full_attention"])
            out[name] = {kind: dict(plain) for kind in kinds} if by_kind else plain | value
        else:
            out[name] = value
    return out


def _tower_of_stock(config: Any) -> list[str]:
    """Replaces a vision tower whose package is not installed by a small CLIP."""
    from transformers import CLIPVisionConfig

    config.vision_config = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=OTHER_LAYERS,
        num_attention_heads=HEADS,
        image_size=32,
        patch_size=8,
    )
    return ["vision tower replaced by a small CLIP (its own needs timm)"]


ATTEMPTS = 4
# Ids that a sub-model reads but that only the parent config defines.
_ABOVE = ("vision_start_token_id", "vision_end_token_id")


def build(model_type: str, class_name: str, attempt: int = 0, stock_tower: bool = False, seed: int = 0) -> Built:
    """Builds the small model of an architecture.

    Args:
        model_type, class_name: As transformers registers them.
        attempt: 0 uses the shrunk config as it is; higher values complete it in different ways.
        stock_tower: Use a small CLIP as vision tower.
        seed: Seed of the weights.
    """
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    cls, model_class = CONFIG_MAPPING[model_type], getattr(transformers, class_name)
    plain = cls().to_dict()
    for name, part in getattr(cls, "sub_configs", {}).items():
        if "vision" in name and plain.get(name) is None and hasattr(part, "model_type"):
            plain[name] = part().to_dict()  # a multimodal model whose default config is text only
    settings, ids = shrink(plain)
    for name in ("transformers_version", "architectures", "_name_or_path"):
        settings.pop(name, None)
    config = cls.from_dict(settings if attempt == 0 else _complete(settings, attempt == 2, attempt == 3))
    notes = ["settings without a default were filled in"] if attempt else []
    for name in _ABOVE if attempt else ():
        if not hasattr(config, name):
            setattr(config, name, ids.small(None))
    notes += _tower_of_stock(config) if stock_tower else []
    torch.manual_seed(seed)
    try:
        model = model_class._from_config(config, attn_implementation="sdpa")
    except ValueError as error:
        if "attention implementation" not in str(error):
            raise
        model = model_class._from_config(config, attn_implementation="eager")
    return Built(widen(model.eval().float()), ids, notes)


def widen(model: nn.Module) -> nn.Module:
    """Redraws weights with a larger variance, so that logits, attention and routing differ clearly between tokens."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.is_floating_point():
                continue
            if parameter.dim() >= 2 and "conv" not in name:
                parameter.normal_(0, 0.5 if "embed" in name else 0.15)
    return model
