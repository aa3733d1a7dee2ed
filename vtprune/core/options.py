# SPDX-License-Identifier: Apache-2.0
"""Options of methods: checks of their types, and storage in JSON files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from ..errors import MethodError
from .files import FileError, read_json
from .method import Method


def check_choices(method: Method) -> None:
    """Raises `MethodError` if an option is not of the type that its class declares.

    `Literal`, numbers (finite, no booleans), booleans, and tuples of these are checked; other types are not.
    """
    try:
        hints = get_type_hints(type(method))
    except (NameError, TypeError):  # a user's class may use names that only a type checker resolves
        return
    for name, hint in hints.items():
        if get_origin(hint) is ClassVar or name not in vars(method):
            continue
        value = getattr(method, name)
        if not _fits(value, hint):
            expected = " or ".join(map(repr, get_args(hint))) if get_origin(hint) is Literal else _NAMES.get(hint, hint)
            raise MethodError(f"{type(method).__name__}.{name} is {value!r}; expected {expected}")


_NAMES: dict[Any, str] = {float: "a finite number", int: "a whole number", bool: "True or False"}


def _fits(value: Any, hint: Any) -> bool:
    """Whether an option's value is of a declared type; True for types that are not checked."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return value in parts
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if hint is NoneType:
        return value is None
    if hint is bool:
        return isinstance(value, bool)
    if hint is int:
        return isinstance(value, Integral) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if origin is tuple and len(parts) == 2 and parts[1] is ...:
        return isinstance(value, (tuple, list)) and all(_fits(item, parts[0]) for item in value)
    return True


def save_options(method: Method, names: Sequence[str], path: str | Path, about: Mapping[str, Any]) -> None:
    """Writes the named options of a method as JSON, together with the entries of `about`."""
    options = {"method": method.name} | {name: getattr(method, name) for name in names}
    Path(path).write_text(json.dumps(options | dict(about), indent=1) + "\n", encoding="utf-8")


def load_options(method: str, schemas: Mapping[str, Any], path: str | Path, source: str) -> dict[str, Any]:
    """Reads options from a file written by `save_options`; lists become tuples.

    Args:
        method: Registered name of the method that the file must be for.
        schemas: A JSON Schema for each option, all of which the file must have; other keys are ignored.
        path: The file.
        source: What the file was expected to hold, for the message.

    Raises:
        MethodError: The file is missing or has other content.
    """
    properties = {"method": {"const": method}, **schemas}
    try:
        data = read_json(path, {"type": "object", "required": [*properties], "properties": properties})
    except FileError as error:
        raise MethodError(f"{path} holds no {source}: {error}") from error
    found = {name: data[name] for name in schemas}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}
