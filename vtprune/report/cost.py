# SPDX-License-Identifier: Apache-2.0
"""Cost of visual tokens: FLOPs counted as in the papers, and bytes of the KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of a decoder from which its costs are computed.

    Attributes:
        layers: Number of layers.
        width: Hidden size `d`.
        mlp: Width `m` of the feed-forward layer.
        kv_heads, head_dim: Number of KV heads and size of a head.
        itemsize: Bytes per value in the cache.
    """

    layers: int
    width: int
    mlp: int
    kv_heads: int
    head_dim: int
    itemsize: int

    @classmethod
    def of(cls, config: Any, itemsize: int) -> DecoderShape:
        """Reads the sizes from a transformers text config."""
        heads = getattr(config, "num_attention_heads", None) or 1
        width = config.hidden_size
        mlp = getattr(config, "intermediate_size", None)
        return cls(
            layers=config.num_hidden_layers,
            width=width,
            mlp=mlp if isinstance(mlp, int) else 4 * width,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or width // heads,
            itemsize=itemsize,
        )


def layer_flops(tokens: float, width: int, mlp: int) -> float:
    """Multiply-adds of one decoder layer over `tokens` visual tokens: `4 n d^2 + 2 n^2 d + 3 n d m` (FastV, section 4).

    Gives 3.817 T for LLaVA-1.5-7B and 20.83 T for LLaVA-NeXT-7B over all layers, the 100 % of the papers' tables.
    """
    return 4 * tokens * width**2 + 2 * tokens**2 * width + 3 * tokens * width * mlp


def decoder_flops(tokens: Sequence[float], shape: DecoderShape) -> float:
    """Sum over layers of `layer_flops`, from the visual tokens that enter each layer."""
    return sum(layer_flops(n, shape.width, shape.mlp) for n in tokens)


def kv_bytes(slots: Sequence[int], batch: int, shape: DecoderShape) -> int:
    """Bytes of keys and values for `slots` cached tokens per layer."""
    return sum(2 * batch * n * shape.kv_heads * shape.head_dim * shape.itemsize for n in slots)
