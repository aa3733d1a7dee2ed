# SPDX-License-Identifier: Apache-2.0
"""Arguments of a call: by name, without `inspect` at every call, and the tensors inside them."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Parameters:
    """Parameters of a function.

    Attributes:
        positional: Names of those that may be given by position, in order.
        named: Names of all of them.
        rest: Name of the one that takes further positional arguments, or None.
    """

    positional: tuple[str, ...]
    named: frozenset[str]
    rest: str | None

    def bind(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments by name; extra ones by theirs, or by that of `rest` and a number."""
        bound = dict(zip(self.positional, args, strict=False))
        for number, value in enumerate(args[len(self.positional) :]):
            bound[f"{self.rest}_{number}"] = value
        bound.update(kwargs)
        return bound


_known: weakref.WeakKeyDictionary[Any, Parameters] = weakref.WeakKeyDictionary()


def parameters(function: Callable) -> Parameters:
    """Parameters of a function or a bound method, read once."""
    key = getattr(function, "__func__", function)
    found = _known.get(key)
    if found is None:
        given = list(inspect.signature(function).parameters.values())
        by_place = tuple(p.name for p in given if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))
        named = frozenset(p.name for p in given if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL))
        rest = next((p.name for p in given if p.kind is p.VAR_POSITIONAL), None)
        found = _known[key] = Parameters(by_place, named, rest)
    return found


def parameters_of(module: nn.Module) -> Parameters:
    """Parameters of a module's forward, or of its class's where a wrapper of `*args, **kwargs` hides them."""
    found = parameters(module.forward)
    return found if found.named else parameters(MethodType(type(module).forward, module))


def hidden_states(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """The hidden states among the arguments of a decoder layer."""
    return kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]


def with_hidden_states(args: tuple, kwargs: dict[str, Any], states: Tensor) -> tuple[tuple, dict[str, Any]]:
    """The arguments of a decoder layer with other hidden states."""
    if "hidden_states" in kwargs:
        return args, {**kwargs, "hidden_states": states}
    return (states, *args[1:]), kwargs


def map_tensors(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """Applies `function` to every tensor inside tuples, lists and dicts; other values pass unchanged."""
    if isinstance(value, Tensor):
        return function(value)
    if type(value) in (tuple, list):
        return type(value)(map_tensors(item, function) for item in value)
    if type(value) is dict:
        return {key: map_tensors(item, function) for key, item in value.items()}
    return value
