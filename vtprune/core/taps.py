# SPDX-License-Identifier: Apache-2.0
"""PrefillOutputs what taps recorded inside the decoder, for text as well as for visual tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..errors import MethodError
from .tokens import Tokens


def over_prompt(record: Tensor, tokens: Tokens) -> Tensor:
    """What a tap recorded since tokens were last dropped, for all tokens of the prompt.

    Args:
        record: `[B, T, ...]` of a tap without `columns`.
        tokens: Tokens of the present stage.

    Returns:
        Tensor: `[C, ...]` in the rows of `tokens.prompt`, on the device of `tokens.hidden`.

    Raises:
        MethodError: The tokens come without a prompt.
    """
    prompt = tokens.prompt
    if prompt is None:
        raise MethodError("this method reads the whole prompt; these tokens come without it")
    column = prompt.slot
    if record.shape[1] > int(column.max()) + 1 and len(tokens) == int(tokens.originals.sum()):
        # A stage with nothing to drop took padding away after the record was made; all tokens are there, but moved.
        moved = tokens.position - column[prompt.visual]  # [M], the same within a sample
        column = column + moved[tokens.offsets[:-1]].repeat_interleave(prompt.offsets.diff())
    batch, column = prompt.batch.to(record.device), column.to(record.device)
    return record[batch, column].to(tokens.hidden.device)


def layer_input(args: tuple, kwargs: dict[str, Any], output: Any) -> Tensor:
    """`[B, T, D]` states that enter a decoder layer or one of its modules."""
    return next(x for x in (kwargs.get("hidden_states"), *args, *kwargs.values()) if isinstance(x, Tensor))


def layer_output(args: tuple, kwargs: dict[str, Any], output: Any) -> Tensor:
    """`[B, T, D]` states that leave it, with or without a tuple around them."""
    return output[0] if isinstance(output, tuple) else output
