# SPDX-License-Identifier: Apache-2.0
"""Cost of visual tokens: FLOPs counted as in the papers, and bytes of the KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..models.transformers_names import layer_configs

# Bytes that a layer caches of one token, None if unknown, and the most tokens that it holds, None for all.
LayerSize = tuple[int | None, int | None]


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of a decoder from which its costs are computed.

    Attributes:
        width: Hidden size `d`.
        mlp: Width `m` of the feed-forward layer of each layer.
        cached: Bytes that each layer caches of one token.
        held: For each layer, the largest number of tokens that its cache holds (a sliding window); None for all.
    """

    width: int
    mlp: tuple[int, ...]
    cached: tuple[int, ...]
    held: tuple[int | None, ...]

    @classmethod
    def of(cls, config: Any, layers: int, itemsize: int) -> DecoderShape:
        """Reads the sizes from the transformers text config of a decoder with `layers` layers.

        Layers are taken to cache keys and values of all tokens, with `itemsize` bytes per value.
        """
        width, each = config.hidden_size, layer_configs(config, layers)
        cached = tuple(2 * _keys(c, width) * itemsize for c in each)
        return cls(width, tuple(_mlp(c, width) for c in each), cached, (None,) * layers)

    def in_cache(self, sizes: Sequence[LayerSize]) -> DecoderShape:
        """The same decoder with what its layers keep in a cache."""
        known = zip(sizes, self.cached, strict=True)
        cached = tuple(usual if size is None else size for (size, _), usual in known)
        return replace(self, cached=cached, held=tuple(most for _, most in sizes))

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.cached)


def _mlp(config: Any, width: int) -> int:
    """Width of the feed-forward layer of a layer with this config."""
    mlp = getattr(config, "intermediate_size", None)
    return mlp if isinstance(mlp, int) else 4 * width


def _keys(config: Any, width: int) -> int:
    """Number of values in the keys of one token of a layer with this config."""
    heads = getattr(config, "num_attention_heads", None) or 1
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return kv_heads * (getattr(config, "head_dim", None) or width // heads)


def layer_flops(tokens: float, width: int, mlp: int) -> float:
    """Multiply-adds of one decoder layer over `tokens` visual tokens: `4 n d^2 + 2 n^2 d + 3 n d m` (FastV, section 4).

    Gives 3.817 T for LLaVA-1.5-7B and 20.83 T for LLaVA-NeXT-7B over all layers, the 100 % of the papers' tables.
    """
    return 4 * tokens * width**2 + 2 * tokens**2 * width + 3 * tokens * width * mlp


def decoder_flops(tokens: Sequence[float], shape: DecoderShape) -> float:
    """Sum over layers of `layer_flops`, from the visual tokens that enter each layer."""
    return sum(layer_flops(n, shape.width, mlp) for n, mlp in zip(tokens, shape.mlp, strict=True))


def kv_bytes(slots: Sequence[int], batch: int, shape: DecoderShape) -> int:
    """Bytes of keys and values for `slots` cached tokens per layer."""
    layers = zip(slots, shape.held, shape.cached, strict=True)
    return sum(batch * size * (n if most is None else min(n, most)) for n, most, size in layers)
