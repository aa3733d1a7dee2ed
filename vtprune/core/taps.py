# SPDX-License-Identifier: Apache-2.0
"""Helpers for records of taps inside the decoder, for text as well as for visual tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..errors import MethodError
from .tokens import Tokens


def over_prompt(record: Tensor, tokens: Tokens) -> Tensor:
    """Rows of a tap's record for all tokens of the prompt.

    Args:
        record: `[B, T, ...]` of a tap without `columns`, made since tokens were last dropped.
        tokens: Tokens of the current stage.

    Returns:
        Tensor: `[C, ...]` in the rows of `tokens.prompt`, on the device of `tokens.hidden`.

    Raises:
        MethodError: The tokens come without a prompt.
    """
    prompt = tokens.prompt
    if prompt is None:
        raise MethodError("Tokens.prompt is None, but this method reads the whole prompt; use it with a patched model")
    slot = prompt.slot
    if record.shape[1] > int(slot.max()) + 1 and len(tokens) == int(tokens.originals.sum()):
        # A stage that dropped no token removed padding after the record was made, which shifted all tokens.
        shift = tokens.position - slot[prompt.visual]  # [M], the same within a sample
        slot = slot + shift[tokens.offsets[:-1]].repeat_interleave(prompt.offsets.diff())
    batch, slot = prompt.batch.to(record.device), slot.to(record.device)
    return record[batch, slot].to(tokens.hidden.device)


def mean_of_streams(states: Tensor, width: int) -> Tensor:
    """Mean over the streams that hyper-connections carry between layers; states of a single stream unchanged.

    Args:
        states: `[N, S, D]`, `[N, S * D]` or, of a single stream, `[N, D]`.
        width: D.

    Returns:
        Tensor: `[N, D]`.
    """
    if states.shape[1:] == (width,) or states.shape[-1] % width:
        return states
    return states.reshape(len(states), -1, width).mean(1)


def layer_input(args: tuple, kwargs: dict[str, Any], output: Any) -> Tensor:
    """States that enter a decoder layer or one of its modules, `[B, T, D]` (see `mean_of_streams` for other shapes)."""
    return next(x for x in (kwargs.get("hidden_states"), *args, *kwargs.values()) if isinstance(x, Tensor))


def layer_output(args: tuple, kwargs: dict[str, Any], output: Any) -> Tensor:
    """States that leave a decoder layer or one of its modules, maybe in a tuple; shapes as of `layer_input`."""
    return output[0] if isinstance(output, tuple) else output
