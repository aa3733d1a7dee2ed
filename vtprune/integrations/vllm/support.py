# SPDX-License-Identifier: Apache-2.0
"""Which models and set-ups of vLLM can be served pruned; the others are refused by name, when the server starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...core.certificate import Certificate
from ...errors import CertificateError
from ...methods import Method
from .settings import ServingError, Settings, reads_tower

# More than 0 and nothing: it turns on vLLM's interface for pruned media, by which kept tokens keep their M-RoPE
# positions, and leaves all tokens of a video for the plug-in to choose from (`int(n * (1 - rate))` is `n`).
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
        raise ServingError(
            f"{name} is an encoder-decoder: its visual tokens never enter the decoder's prompt; leave 'vtprune' out"
        )
    if config.speculative_config is not None and model.uses_mrope:
        raise ServingError(
            f"{name}: M-RoPE positions of pruned images and speculative decoding are not tried together; leave one out"
        )
    if model.uses_mrope and config.parallel_config.pipeline_parallel_size > 1:
        raise ServingError(
            f"{name}: vLLM updates M-RoPE positions of pruned images on the first stage of a pipeline only; found "
            f"pipeline_parallel_size={config.parallel_config.pipeline_parallel_size}, expected 1; use "
            "tensor_parallel_size"
        )
    if config.lora_config is not None and config.lora_config.enable_tower_connector_lora:
        raise ServingError(
            f"{name}: vLLM counts the vision encoder's tokens by the prompt's for enable_tower_connector_lora, which "
            "pruning makes fewer; adapters of the language model work"
        )
    multimodal = model.multimodal_config
    modalities = ("image", "video") if model.uses_mrope else ("image",)
    reads = settings.tower is not None or reads_tower(settings.method)
    if not any(map(multimodal.get_limit_per_prompt, modalities)) and (reads or not multimodal.enable_mm_embeds):
        raise ServingError(
            f"{name} takes no images here (limit_mm_per_prompt, language_model_only): its vision encoder is not "
            "loaded; leave 'vtprune' out"
        )
    if settings.video_method != settings.method and not model.uses_mrope:
        raise ServingError(
            f"{name}: found video_method {settings.video_method.name}, and clips of this model are not pruned: the "
            "plug-in prunes those of models with M-RoPE only (Qwen2.5-VL, Qwen3-VL); leave video_method out"
        )
    if multimodal.video_pruning_rate not in (None, 0, NO_RATE):
        raise ServingError(
            f"{name}: video_pruning_rate={multimodal.video_pruning_rate} asks vLLM to prune the videos that vtprune "
            "prunes; leave it out"
        )
    if settings.certificate is not None:
        _check_certificate(name, settings.certificate, model)
        if settings.budget.may_drop and not model.uses_mrope:
            _check_numbering(name, settings.method)
    _check_method(name, settings.method, config)
    _check_method(name, settings.video_method, config)
    if settings.tower is not None:
        _check_tower(name, config)
    if model.uses_mrope:
        multimodal.video_pruning_rate = NO_RATE


def _check_certificate(name: str, certificate: Certificate, model: Any) -> None:
    """Refuses a certificate of another model, other weights or another dtype.

    Weights are compared by their files, if both the certified and the served model are read from a folder.
    """
    from transformers import AutoConfig

    place = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    try:
        certificate.check_config(AutoConfig.from_pretrained(model.hf_config_path or model.model, **place))
        if Path(model.model).is_dir():
            certificate.check_files(model.model)
    except CertificateError as error:
        raise ServingError(f"{name}: {error}") from None
    certified, served = certificate.about.get("dtype"), str(model.dtype).removeprefix("torch.")
    if certified not in (None, served):
        raise ServingError(
            f"{name}: the certificate is for {certified}, and the model is served in {served}; serve it in "
            f"{certified}, or certify again"
        )


def _check_numbering(name: str, method: Method) -> None:
    """Refuses a certificate of answers with tokens at other positions than vLLM gives them on one axis."""
    found = getattr(method, "positions", None)
    if found == "compact":
        return
    remedy = f"certify {method.name}" if found else f"{method.name} has no such option: certify divprune or another"
    raise ServingError(
        f"{name}: the certificate is for kept tokens at their original positions, and vLLM numbers those of this model "
        f"through; {remedy} with positions=compact, or give method and ratio without a certificate"
    )


def _check_tower(name: str, config: Any) -> None:
    """Refuses set-ups in which a vision tower cannot be cut."""
    if config.compilation_config.compile_mm_encoder:
        raise ServingError(
            f"{name}: tower cuts the vision encoder, which compile_mm_encoder compiles whole; leave one out"
        )
    if config.parallel_config.tensor_parallel_size > 1:
        raise ServingError(f"{name}: tower was not tried with a vision encoder on several ranks; leave tower out")


def _check_method(name: str, method: Method, config: Any) -> None:
    """Refuses a method that cannot read what it needs in this set-up."""
    if method.name == "iwp" and config.lora_config is not None:
        raise ServingError(
            f"{name}: iwp reads keys of the first layer before requests have their adapters; with LoRA use divprune"
        )
    if method.name == "iwp" and getattr(config.model_config.multimodal_config, "mm_encoder_only", False):
        raise ServingError(
            f"{name}: iwp reads keys of the decoder, which mm_encoder_only does not load; use divprune here and where "
            "the decoder is served"
        )
    if config.model_config.uses_mrope and getattr(method, "positions", None) == "compact":
        raise ServingError(
            f"{name}: kept tokens of models with M-RoPE keep their positions in vLLM; {method.name}: found "
            "positions='compact', expected 'original'; leave positions out"
        )
    if not reads_tower(method):
        return
    estimator = getattr(method, "estimator", None)
    if estimator in ("exact", "jvp") and config.device_config.device_type == "cpu":
        raise ServingError(
            f"{name}: {method.name} finds neither weights nor derivatives in vLLM's linear layers for CPUs; found "
            f"estimator={estimator!r}, expected 'difference' or 'auto'"
        )
    if config.compilation_config.compile_mm_encoder:
        raise ServingError(
            f"{name}: {method.name} reads inside the vision encoder, which compile_mm_encoder hides; use divprune"
        )
    if config.model_config.multimodal_config.mm_encoder_tp_mode == "data":
        raise ServingError(
            f"{name}: {method.name} reads the vision encoder, of which every rank sees other images with "
            "mm_encoder_tp_mode='data'; use divprune"
        )
    if config.model_config.uses_mrope:
        raise ServingError(
            f"{name}: {method.name} cannot read vision towers of the Qwen-VL kind in vLLM; use divprune or iwp"
        )


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
