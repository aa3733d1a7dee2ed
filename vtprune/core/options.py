# SPDX-License-Identifier: Apache-2.0
"""Options of methods: declared types and ranges, and their checks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from ..errors import MethodError


@dataclass(frozen=True)
class Range:
    """The range of a numeric option, for `Annotated`.

    Attributes:
        low, high: Bounds.
        open: Bounds that are themselves excluded.
    """

    low: float
    high: float
    open: tuple[float, ...] = ()

    def __contains__(self, value: Any) -> bool:
        return self.low <= value <= self.high and value not in self.open

    def __str__(self) -> str:
        ends = "(["[self.low not in self.open], ")]"[self.high not in self.open]
        return f"in {ends[0]}{self.low:g}, {self.high:g}{ends[1]}"


# Types of options. The upper bounds are far beyond any useful value; they keep later arithmetic from overflowing.
Count = Annotated[int, Range(0, 1_000_000)]
Positive = Annotated[int, Range(1, 1_000_000)]
Share = Annotated[float, Range(0, 1)]
Cosine = Annotated[float, Range(-1, 1)]
AtLeastZero = Annotated[float, Range(0, 1e6)]
AboveZero = Annotated[float, Range(0, 1e6, open=(0,))]
Layers = tuple[Count, ...]
Shares = tuple[Annotated[float, Range(0, 1, open=(0, 1))], ...]  # of a schedule
Seed = Annotated[int, Range(0, 2**63 - 1)]  # what torch.Generator takes


def check_options(method: Any) -> None:
    """Raises `MethodError` if an option does not have the type, or is outside the range, that its class declares.

    Numbers must be finite; booleans are not numbers. Type hints that only a type checker can resolve are not checked.
    """
    hints = _hints(type(method))
    for option in dataclasses.fields(method) if dataclasses.is_dataclass(method) else ():
        hint, value = hints.get(option.name, Any), getattr(method, option.name, dataclasses.MISSING)
        if value is not dataclasses.MISSING and not fits(value, hint):
            raise MethodError(f"{type(method).__name__}.{option.name} is {shorten(value)}; expected {in_words(hint)}")


def _hints(cls: type) -> dict[str, Any]:
    try:
        hints = get_type_hints(cls, include_extras=True)
    except (NameError, TypeError):  # a user's class may use names that only a type checker resolves
        return {}
    return {name: hint for name, hint in hints.items() if get_origin(hint) is not ClassVar}


def fits(value: Any, hint: Any) -> bool:
    """Whether a value has a declared type; anything fits a type that is not checked."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return fits(value, parts[0]) and all(value in bound for bound in parts[1:] if isinstance(bound, Range))
    if origin is Literal:
        return any(type(value) is type(part) and value == part for part in parts)
    if origin in (Union, UnionType):
        return any(fits(value, part) for part in parts)
    if hint is int:
        return isinstance(value, Integral) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, Real) and not isinstance(value, bool) and _finite(value)
    if origin is tuple and len(parts) == 2 and parts[1] is ...:
        return isinstance(value, (tuple, list)) and all(fits(item, parts[0]) for item in value)
    kind = (tuple, list) if origin is tuple else origin or hint  # lists come from JSON
    try:
        return isinstance(value, kind)
    except TypeError:  # no class, or a protocol that cannot be asked
        return True


def _finite(value: Real) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float holds
        return False


def in_words(hint: Any) -> str:
    """The values that a declared type allows, for an error message."""
    return " or ".join(_words(hint))


def _words(hint: Any) -> list[str]:
    """Descriptions of the values that a declared type allows, one for each alternative."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return [f"{_words(parts[0])[0]} {bound}" for bound in parts[1:] if isinstance(bound, Range)]
    if origin is Literal:
        return [repr(part) for part in parts]
    if origin in (Union, UnionType):
        return [word for part in parts for word in _words(part)]
    if origin is tuple and len(parts) == 2 and parts[1] is ...:
        return [f"a tuple, each item {_words(parts[0])[0]}"]
    names = {float: "a finite number", int: "a whole number", bool: "True or False", str: "a text", type(None): "None"}
    return [names.get(hint) or f"an instance of {getattr(hint, '__name__', hint)}"]


def option_names(cls: type) -> str:
    """Names of a class's options, for a message; `no options` where it has none."""
    found = [field.name for field in dataclasses.fields(cls) if field.init] if dataclasses.is_dataclass(cls) else []
    return ", ".join(found) or "no options"


def shorten(value: Any) -> str:
    """The representation of a value for an error message, at most 80 characters."""
    try:
        text = repr(value)
    except ValueError:  # an integer with too many digits to be printed
        return f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


def from_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """Options as methods take them, from JSON values: lists become tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
