# SPDX-License-Identifier: Apache-2.0
"""Published layer numbers, scaled to decoders of other depths."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

from ..errors import MethodError
from .method import Stage


def scale_layer(layer: int, depth: int | None, num_layers: int) -> int:
    """Layer of a decoder of `num_layers` layers that corresponds to `layer` in one of `depth` layers.

    Args:
        layer: Published 0-based layer.
        depth: Number of layers of the decoder that it was published for; None takes `layer` as it is.
        num_layers: Number of layers of the model's decoder.

    Returns:
        int: `layer * num_layers / depth` rounded half up, at least 1 (a cut inside the decoder stays inside it) and at
        most the last layer, which is 0 in a decoder of a single layer.
    """
    scaled = layer if depth is None else (2 * layer * num_layers + depth) // (2 * depth)
    return min(max(scaled, 1), num_layers - 1)


def scale_schedule(
    layers: Sequence[int], shares: Sequence[float], depth: int | None, num_layers: int, name: str
) -> tuple[Stage, ...]:
    """Scales a published schedule; of cuts that fall on the same layer of a shallow decoder, the last one counts.

    Raises:
        MethodError: Layers and shares differ in number, or a layer is outside the decoder of the publication.
    """
    if not layers or len(layers) != len(shares):
        raise MethodError(
            f"{name} has {len(layers)} layers {tuple(layers)} and {len(shares)} shares {tuple(shares)}; "
            "expected one share per layer"
        )
    end = num_layers if depth is None else depth
    if not all(isinstance(layer, Integral) and 0 <= layer < end for layer in layers):
        raise MethodError(
            f"{name} cuts before layers {tuple(layers)} of a decoder of {end}; expected whole numbers below that"
        )
    cuts = {scale_layer(layer, depth, num_layers): share for layer, share in zip(layers, shares, strict=True)}
    return tuple(Stage(layer, share) for layer, share in cuts.items())
