# SPDX-License-Identifier: Apache-2.0
"""Options of methods that take one of a few values."""

from __future__ import annotations

from typing import Literal, get_args, get_origin, get_type_hints

from ..errors import MethodError
from .base import Method


def check_choices(method: Method) -> None:
    """Raises `MethodError` where an option whose type is a `Literal` has another value than those."""
    for name, hint in get_type_hints(type(method)).items():
        if get_origin(hint) is not Literal or name not in vars(method):
            continue
        value, allowed = getattr(method, name), get_args(hint)
        if value not in allowed:
            expected = " or ".join(map(repr, allowed))
            raise MethodError(f"{type(method).__name__}.{name} is {value!r}; expected {expected}")
