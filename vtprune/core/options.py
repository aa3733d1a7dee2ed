# SPDX-License-Identifier: Apache-2.0
"""Options of methods: those that take one of a few values, and those that are kept in a file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ..errors import MethodError
from .method import Method


def check_choices(method: Method) -> None:
    """Raises `MethodError` where an option whose type is a `Literal` has another value than those."""
    for name, hint in get_type_hints(type(method)).items():
        if get_origin(hint) is not Literal or name not in vars(method):
            continue
        value, allowed = getattr(method, name), get_args(hint)
        if value not in allowed:
            expected = " or ".join(map(repr, allowed))
            raise MethodError(f"{type(method).__name__}.{name} is {value!r}; expected {expected}")


def save_options(method: Method, names: Sequence[str], path: str | Path, about: Mapping[str, Any]) -> None:
    """Writes the named options of a method as JSON, with whatever else is to be remembered `about` them."""
    options = {"method": method.name} | {name: getattr(method, name) for name in names}
    Path(path).write_text(json.dumps(options | dict(about), indent=1) + "\n", encoding="utf-8")


def load_options(names: Sequence[str], path: str | Path, source: str) -> dict[str, Any]:
    """Reads the named options from a file of `save_options`; lists become tuples.

    Args:
        names: The options, all of which the file must have.
        path: The file.
        source: What the file was expected to be, for the message.

    Raises:
        MethodError: The file is missing, or holds something else.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        found = {name: data[name] for name in names}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise MethodError(f"{path} holds no {source}: {error}") from error
    return {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}
