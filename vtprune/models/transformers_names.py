# SPDX-License-Identifier: Apache-2.0
"""Names of transformers that may change, and lookups by kind for those that have changed before.

If transformers renames one of them, only this module has to change. `missing` lists the names that the installed
version lacks. Modules that handle one kind of model name what only that kind has, such as the tiles of LLaVA-NeXT.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

# Methods of `GenerationMixin`.
MAKE_CANDIDATES = "_get_candidate_generator"  # makes the generator of assisted generation
RUN_PROMPT = "_prefill"  # runs a prompt, in chunks where `prefill_chunk_size` is given
# Arguments of a composite's forward.
ENCODER_OUTPUTS = "mm_encoder_outputs"  # features that were encoded before the call, by kind
# Arguments of decoders that take a KV cache, newest first.
CACHE_ARGUMENTS = ("cache", "past_key_values")
# Method of attention modules that cache latents; makes keys and values of what is cached as such.
EXPAND_LATENTS = "expand_kv"
# Method of processors that counts the placeholders of pictures from their sizes.
COUNT_TOKENS = "_get_num_multimodal_tokens"
# Attributes of configs: whether settings differ between layers, and the config of each layer.
VARIES, OF_LAYERS = "is_heterogeneous", "per_layer_config"
# Attributes of a cache's layers with a sliding window that keeps the prompt, wherever it moves.
PROMPT_LENGTH, WINDOW = "prefill_length", "sliding_window"


def encoder_method(kind: str) -> str:
    """Name of the composite's method that encodes features of a kind, such as "image" or "video"."""
    return f"get_{kind}_features"


def is_cache(value: Any) -> bool:
    """Whether a value is a KV cache, recognized by its methods and not by the argument it is passed in."""
    return hasattr(value, "get_mask_sizes") and hasattr(value, "get_seq_length")


def cache_of(values: Mapping[str, Any] | Iterable[Any]) -> Any:
    """The KV cache among arguments or the fields of an output, or None."""
    found = values.values() if isinstance(values, Mapping) else values
    for value in found:
        if is_cache(value):
            return value
    return None


def takes_cache(function: Callable) -> bool:
    """Whether a forward takes a KV cache."""
    return not set(CACHE_ARGUMENTS).isdisjoint(inspect.signature(function).parameters)


def attention_functions() -> Any:
    """The registry of attention functions."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS


def attention_name(config: Any) -> str:
    """Name of the attention implementation of a config."""
    return str(getattr(config, "_attn_implementation", None) or "eager")


def mask_function_name(config: Any) -> str:
    """Name of the function that makes masks for the attention implementation of a config."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    name = attention_name(config)
    return str(getattr(ALL_MASK_ATTENTION_FUNCTIONS.get(name), "__name__", name))


def rope_parameters(config: Any) -> dict[str, Any]:
    """Parameters of the rotary embedding, empty where a config has none."""
    return getattr(config, "rope_parameters", None) or {}


def layer_configs(config: Any, count: int) -> list[Any]:
    """The config of each of the first `count` layers: one for all, unless it has settings that differ between layers.

    Such a setting (head sizes in Gemma 4, numbers of experts in dots.note) cannot be read from the config of all.
    """
    if not getattr(config, VARIES, False):
        return [config] * count
    return list(getattr(config, OF_LAYERS))[:count]


def missing() -> list[str]:
    """Lists the names that the installed transformers lacks, with what vtprune needs each for."""
    import transformers
    from transformers import cache_utils, generation, masking_utils, modeling_utils

    wanted: list[tuple[Any, str, str]] = [
        (modeling_utils, "ALL_ATTENTION_FUNCTIONS", "to read queries, keys and values at the attention function"),
        (masking_utils, "ALL_MASK_ATTENTION_FUNCTIONS", "to build masks in the form that the attention takes"),
        (generation.GenerationMixin, MAKE_CANDIDATES, "to keep assisted generation from drafting before the prompt"),
        (generation.GenerationMixin, RUN_PROMPT, "to run prompts in one piece"),
        (cache_utils.DynamicCache, "get_mask_sizes", "to recognize caches, and to override it in pruned ones"),
        (cache_utils.DynamicCache, "get_seq_length", "to let a pruned cache report the conversation's length"),
        (cache_utils.DynamicCache(), "layers", "to read keys and values of each layer"),
        (transformers.PreTrainedConfig, VARIES, "to tell that settings differ between layers"),
        (transformers.PreTrainedConfig, OF_LAYERS, "to read the settings of each layer"),
        (transformers, "AutoModelForImageTextToText", "to load models"),
    ]
    return [
        f"transformers {transformers.__version__} has no {getattr(owner, '__name__', type(owner).__name__)}.{name}: "
        f"vtprune needs it {use}; update vtprune.models.transformers_names"
        for owner, name, use in wanted
        if not hasattr(owner, name)
    ]
