# SPDX-License-Identifier: Apache-2.0
"""Gradient checkpointing of layers together with their hooks.

From 5.23 on, transformers checkpoints a layer's `forward`, inside its hooks. Earlier versions checkpoint `__call__`:
the backward pass calls the layer with its hooks and the decoder's arguments, long after the decoder has returned, and
the hooks have to replace these arguments again. The replacements are stored on a tensor among the keyword arguments:
the backward pass passes the same object, and it is freed with the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..errors import UnsupportedModelError
from ..models.arguments import hidden_states, map_tensors, with_hidden_states

_ATTRIBUTE = "_vtprune_given"


@dataclass
class _SavedArguments:
    """Arguments that replaced those of a layer."""

    rest: tuple  # positional arguments after the hidden states
    changed: dict[str, Any]  # keyword arguments that differ
    cut_hidden: Callable[[Tensor], Tensor] | None  # cuts hidden states down to the positions that are left


def runs_hooks_again(layer: nn.Module) -> bool:
    """Whether the backward pass will call `layer` again, including its hooks."""
    checkpointed = layer.training and getattr(layer, "gradient_checkpointing", False)
    return bool(checkpointed) and type(layer).__call__ is not nn.Module.__call__


def save_arguments(
    number: int,
    layer: nn.Module,
    given: tuple[tuple, dict[str, Any]],
    new: tuple[tuple, dict[str, Any]],
    cut_hidden: Callable[[Tensor], Tensor] | None,
) -> None:
    """Stores the arguments `new` that replace `given` for layer `number`, for as long as its graph lives.

    Raises:
        UnsupportedModelError: The keyword arguments contain no tensor to store them on.
    """
    anchor = _anchor(given[1])
    if anchor is None:
        raise UnsupportedModelError(
            f"{type(layer).__name__} is checkpointed together with its hooks, and none of its keyword arguments is a "
            "tensor, on which pruning could store its arguments for the backward pass; install transformers 5.23 or "
            "newer, or call gradient_checkpointing_disable()"
        )
    changed = {n: v for n, v in new[1].items() if n != "hidden_states" and v is not given[1].get(n)}
    vars(anchor).setdefault(_ATTRIBUTE, {})[number] = _SavedArguments(new[0][1:], changed, cut_hidden)


def replay(number: int, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Arguments of layer `number` in the backward pass; None unless it repeats a pruned call."""
    if not runs_hooks_again(layer):
        return None
    known: dict[int, _SavedArguments] = getattr(_anchor(kwargs), _ATTRIBUTE, {})
    given = known.get(number)
    if given is None:
        return None
    states = hidden_states(args, kwargs)
    states = states if given.cut_hidden is None else given.cut_hidden(states)
    return with_hidden_states((*args[:1], *given.rest), {**kwargs, **given.changed}, states)


def _anchor(kwargs: dict[str, Any]) -> Tensor | None:
    """The tensor to store arguments on: preferably the rotation, which the decoder makes anew in every call."""
    found: list[Tensor] = []
    for name in sorted(kwargs, key=lambda n: n != "position_embeddings"):
        if name != "hidden_states" and not hasattr(kwargs[name], "get_mask_sizes"):
            map_tensors(kwargs[name], found.append)
    return found[0] if found else None
