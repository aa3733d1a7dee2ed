# SPDX-License-Identifier: Apache-2.0
"""Which models and set-ups of vLLM can be served pruned; the others are refused by name, when the server starts."""

from __future__ import annotations

from typing import Any

from .settings import ServingError, Settings, reads_tower

# More than 0 and nothing: it turns on vLLM's interface for pruned media, by which kept tokens keep their M-RoPE
# positions, and drops no token of a video (`int(n * (1 - rate))` is `n`).
NO_RATE = 1e-300


def check_config(config: Any, settings: Settings) -> None:
    """Refuses what the configuration alone shows to be impossible, and prepares M-RoPE models.

    Args:
        config: A `VllmConfig`.
        settings: What is asked for.

    Raises:
        ServingError: One line, with the model's name and the reason.
    """
    model = config.model_config
    name = f"vtprune: {model.model}"
    if not model.is_multimodal_model:
        raise ServingError(f"{name} takes no images: there is nothing to prune; leave 'vtprune' out")
    if model.is_encoder_decoder:
        raise ServingError(f"{name} is an encoder-decoder: its visual tokens never enter the decoder's prompt")
    if config.speculative_config is not None and model.uses_mrope:
        raise ServingError(f"{name}: M-RoPE positions of pruned images and speculative decoding are not tried together")
    method = settings.method.name
    if method == "iwp" and config.lora_config is not None:
        raise ServingError(
            f"{name}: iwp reads keys of the first layer before requests have their adapters; with LoRA use divprune"
        )
    if config.lora_config is not None and config.lora_config.enable_tower_connector_lora:
        raise ServingError(
            f"{name}: vLLM counts the vision encoder's tokens by the prompt's for enable_tower_connector_lora, which "
            "pruning makes fewer; adapters of the language model work"
        )
    multimodal = model.multimodal_config
    if reads_tower(settings.method) and config.compilation_config.compile_mm_encoder:
        raise ServingError(
            f"{name}: {method} reads inside the vision encoder, which compile_mm_encoder hides; use divprune"
        )
    if reads_tower(settings.method) and multimodal.mm_encoder_tp_mode == "data":
        raise ServingError(
            f"{name}: {method} reads the vision encoder, of which every rank sees other images with "
            "mm_encoder_tp_mode='data'; use divprune"
        )
    if reads_tower(settings.method) and model.uses_mrope:
        raise ServingError(
            f"{name}: {method} cannot read vision towers of the Qwen-VL kind in vLLM; use divprune or iwp"
        )
    if model.uses_mrope and not multimodal.video_pruning_rate:
        multimodal.video_pruning_rate = NO_RATE


def check_model(cls: type, model_config: Any, settings: Settings) -> None:
    """Refuses model classes by structure.

    Args:
        cls: The class that vLLM serves the model with.
        model_config: Its config.
        settings: What is asked for.

    Raises:
        ServingError: One line, with the class and the reason.
    """
    name = f"vtprune: {cls.__name__}"
    if not hasattr(cls, "embed_multimodal"):
        raise ServingError(f"{name} has no embed_multimodal, between whose features and the decoder images are pruned")
    if getattr(cls, "supports_multimodal_raw_input_only", False):
        raise ServingError(f"{name} encodes images inside its forward, where no plug-in can shorten the prompt")
    if model_config.uses_mrope and not getattr(cls, "supports_multimodal_pruning", False):
        raise ServingError(
            f"{name} places tokens on several axes (M-RoPE) and lacks vLLM's interface for pruned media "
            "(SupportsMultiModalPruning), by which kept tokens would keep their positions"
        )
    if hasattr(cls, "_get_expanded_positions") and model_config.multimodal_config.get_limit_per_prompt("video"):
        raise ServingError(
            f"{name} writes times between the frames of videos, which vLLM's interface for pruned media misplaces, "
            """up to an error; serve images alone: --limit-mm-per-prompt '{"video": 0}'"""
        )
