# SPDX-License-Identifier: Apache-2.0
"""Folders of models that cannot be served pruned; only configs and processors are loaded from them."""

from __future__ import annotations

from pathlib import Path

from transformers import LlamaConfig, WhisperConfig, WhisperFeatureExtractor
from vllm_tests.models import TEXT, tokenizer
from vllm_tests.vision_models import SPECIAL, qwen


def llama(folder: Path) -> None:
    """A text-only model."""
    words = tokenizer()
    LlamaConfig(architectures=["LlamaForCausalLM"], vocab_size=len(words), **TEXT, **SPECIAL).save_pretrained(folder)
    words.save_pretrained(folder)


def whisper(folder: Path) -> None:
    """An encoder-decoder model."""
    words = tokenizer()
    config = WhisperConfig(
        architectures=["WhisperForConditionalGeneration"],
        vocab_size=len(words),
        d_model=64,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        decoder_start_token_id=1,
        **SPECIAL,
    )
    config.save_pretrained(folder)
    words.save_pretrained(folder)
    WhisperFeatureExtractor().save_pretrained(folder)


def qwen2_vl(folder: Path) -> None:
    """An M-RoPE model whose class in vLLM lacks the interface for pruned media."""
    vision = {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
    qwen(folder, "Qwen2VL", vision, {"mrope_section": [4, 6, 6]})


MODELS = {"llama": llama, "whisper": whisper, "qwen2_vl": qwen2_vl}
