# SPDX-License-Identifier: Apache-2.0
"""Layers that the backward pass runs again (gradient checkpointing), hooks included.

From 5.23 on, transformers checkpoints a layer's `forward`, inside its hooks. Before, it checkpoints `__call__`: the
backward pass calls the layer, hooks and all, with what the decoder gave it, long after the decoder's call is over. What
the layer was given instead is then needed once more. It is kept on a tensor among its keyword arguments, which the
backward pass hands over as the very same object, and which dies with the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..errors import UnsupportedModelError
from . import gather

_ATTRIBUTE = "_vtprune_given"


@dataclass
class _Given:
    """What a layer was given in place of its arguments."""

    rest: tuple  # positional arguments after the hidden states
    changed: dict[str, Any]  # keyword arguments that differ
    narrow: Callable[[Tensor], Tensor] | None  # from its hidden states to those of the columns that are left


def runs_hooks_again(layer: nn.Module) -> bool:
    """Whether the backward pass will call `layer` once more, hooks included."""
    checkpointed = layer.training and getattr(layer, "gradient_checkpointing", False)
    return bool(checkpointed) and type(layer).__call__ is not nn.Module.__call__


def save_arguments(
    number: int,
    layer: nn.Module,
    given: tuple[tuple, dict[str, Any]],
    instead: tuple[tuple, dict[str, Any]],
    narrow: Callable[[Tensor], Tensor] | None,
) -> None:
    """Keeps what layer `number` is given instead of `given` until its graph is gone.

    Raises:
        UnsupportedModelError: No tensor among the keyword arguments could carry it.
    """
    anchor = _anchor(given[1])
    if anchor is None:
        raise UnsupportedModelError(
            f"{type(layer).__name__} is checkpointed together with its hooks and has no tensor among its keyword "
            "arguments by which the backward pass could find what it was given; install a newer transformers, or call "
            "gradient_checkpointing_disable()"
        )
    changed = {n: v for n, v in instead[1].items() if n != "hidden_states" and v is not given[1].get(n)}
    vars(anchor).setdefault(_ATTRIBUTE, {})[number] = _Given(instead[0][1:], changed, narrow)


def replay(number: int, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """The arguments of layer `number` in the backward pass; None where it is not a repetition of a pruned call."""
    if not runs_hooks_again(layer):
        return None
    known: dict[int, _Given] = getattr(_anchor(kwargs), _ATTRIBUTE, {})
    given = known.get(number)
    if given is None:
        return None
    hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    hidden = hidden if given.narrow is None else given.narrow(hidden)
    if "hidden_states" in kwargs:
        return args, {**kwargs, **given.changed, "hidden_states": hidden}
    return (hidden, *given.rest), {**kwargs, **given.changed}


def _anchor(kwargs: dict[str, Any]) -> Tensor | None:
    """A tensor among a layer's arguments; the rotation where there is one, for the decoder makes it anew every time."""
    found: list[Tensor] = []
    for name in sorted(kwargs, key=lambda n: n != "position_embeddings"):
        if name != "hidden_states" and not hasattr(kwargs[name], "get_mask_sizes"):
            gather.map_tensors(kwargs[name], found.append)
    return found[0] if found else None
