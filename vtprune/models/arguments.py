# SPDX-License-Identifier: Apache-2.0
"""Arguments of a call by name, without `inspect` at every call."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


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


def bind(function: Callable, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a call of `function` by name; what it will not take is its own to refuse."""
    return parameters(function).bind(args, kwargs)
