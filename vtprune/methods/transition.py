# SPDX-License-Identifier: Apache-2.0
"""How much the modules of a decoder layer change each token (TransPrune, arXiv 2507.20630, section 3.2)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from vtprune_kernels import transition_variation

from ..errors import MethodError
from ..selection import segment_ids
from .taps import layer_input, layer_output

Direction = Literal["signed", "absolute"]

MODULES = {
    "attention": ("attn", "attention"),
    "mlp": ("mlp", "feed_forward", "feedforward", "ffn", "moe"),
}


def submodule(layer: nn.Module, part: Literal["attention", "mlp"]) -> nn.Module | None:
    """The attention or the MLP of a decoder layer, found by the names of the layer's own children; None without one."""
    for name, child in layer.named_children():
        is_norm = "norm" in name.lower() or "norm" in type(child).__name__.lower()
        named = any(word in name.lower() for word in MODULES[part])
        if named and not is_norm and next(child.parameters(), None) is not None:
            return child
    return None


def change(x_in: Tensor, x_out: Tensor, direction: Direction = "signed") -> Tensor:
    """Change of every token by a module, before it is set in proportion to the other tokens.

    Args:
        x_in: `[..., D]` normed input of the module.
        x_out: `[..., D]` its output before the residual addition.
        direction: `"signed"` for `1 - cos`, `"absolute"` for `1 - |cos|`.

    Returns:
        Tensor: `[..., 2]` float32, change of length `|out| / |in|` and of direction.
    """
    ratio, turn = transition_variation(x_in, x_out)
    if direction == "absolute":
        turn = 1 - (1 - turn).abs()
    return torch.stack([ratio, turn], -1)


def recorded_change(args: tuple, kwargs: dict[str, Any], output: Any, direction: Direction) -> Tensor | None:
    """Record of a tap on a module: `change` as `[B, T, 2]`, but not of decoding steps.

    Raises:
        MethodError: The module does not turn `[B, T, D]` into as many numbers.
    """
    x_in, x_out = layer_input(args, kwargs, output), layer_output(args, kwargs, output)
    if x_in.dim() == 3 and x_in.shape[1] == 1:
        return None
    if x_in.dim() != 3 or x_out.numel() != x_in.numel():
        raise MethodError(
            f"a module of a decoder layer turns {tuple(x_in.shape)} into {tuple(x_out.shape)}; TransPrune expected "
            "[batch, columns, width] on both sides; use a method that reads attention alone"
        )
    return change(x_in, x_out.reshape(x_in.shape), direction)


def variation(changes: Tensor, segments: Tensor) -> Tensor:
    """Token transition variation of one module: `ratio * softmax(turn)`, the softmax over the tokens of a sample.

    Args:
        changes: `[C, 2]` of `change`.
        segments: `[S + 1]` offsets of the samples.

    Returns:
        Tensor: `[C]`.
    """
    ratio, turn = changes.unbind(-1)
    weight = torch.exp(turn)  # turn is at most 2
    return ratio * weight / pool_sum(weight, segments)


def pool_sum(values: Tensor, segments: Tensor) -> Tensor:
    """`[M]`: the sum of each row's pool."""
    pools = segment_ids(segments, len(values))
    return values.new_zeros(len(segments) - 1).index_add_(0, pools, values)[pools]


def combine(ttv: Tensor, attention: Tensor, segments: Tensor, alpha: float = 0.5) -> Tensor:
    """Score of a cut: both parts as shares of their pool's sum, weighted `2 alpha` and `2 (1 - alpha)`, `[M]`."""
    parts = [x / (pool_sum(x, segments) + 1e-8) for x in (ttv, attention)]
    return 2 * alpha * parts[0] + 2 * (1 - alpha) * parts[1]
