# SPDX-License-Identifier: Apache-2.0
"""Registry of pruning methods by name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..errors import MethodError, one_line
from .method import Method
from .options import check_options, option_names, shorten

_METHODS: dict[str, type[Method]] = {}


def register(name: str) -> Callable[[type[Method]], type[Method]]:
    """Class decorator that makes a method available as `vtprune.patch(model, method=name)`.

    Args:
        name: The published name in snake_case.

    Raises:
        MethodError: The name has other characters than letters, digits, `_`, `-` and `.`, another class is registered
            under it, or the class is not a `Method`.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name):
        raise MethodError(
            f'register was given {shorten(name)}; expected a name of letters, digits, _, - and ., as in "my_name"'
        )

    def add(cls: type[Method]) -> type[Method]:
        if not (isinstance(cls, type) and issubclass(cls, Method)):
            raise MethodError(
                f"{cls!r} is not a subclass of vtprune.methods.Method; derive it from Method or ScoreMethod"
            )
        taken = _METHODS.get(name)
        if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
            raise MethodError(f"the name {name!r} is taken by {taken.__module__}.{taken.__qualname__}; choose another")
        cls.name = name
        _METHODS[name] = cls
        return cls

    return add


def names() -> tuple[str, ...]:
    """Registered names in alphabetical order."""
    return tuple(sorted(_METHODS))


def for_pictures() -> tuple[str, ...]:
    """Registered names of the methods that prune still pictures; the others compare the frames of clips."""
    return tuple(name for name in names() if not _METHODS[name].needs_frames)


def get(name: str, among: Iterable[str] | None = None) -> type[Method]:
    """Returns the method class registered under `name`.

    Args:
        name: A registered name.
        among: Names that the message may suggest; all registered ones by default.

    Raises:
        MethodError: Nothing is registered under it; the message names close matches.
    """
    if isinstance(name, str) and name in _METHODS:
        return _METHODS[name]
    known = names() if among is None else tuple(among)
    near = difflib.get_close_matches(str(name).lower().replace("-", "_"), known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"there are: {', '.join(known)}"
    raise MethodError(f"unknown method {shorten(name)}; {hint}")


def make(name: str, options: Mapping[str, Any]) -> Method:
    """The method of a name with options by name, as files and configurations hold them.

    Raises:
        MethodError: There is no such method, it has no such option, or an option's value cannot be used.
    """
    cls = get(name)
    try:
        return cls(**options)
    except TypeError as error:
        raise MethodError(
            f"method {name} cannot be made with {shorten(options)}: {one_line(error)}; it has {option_names(cls)}"
        ) from error


def resolve(method: str | Method | type[Method]) -> Method:
    """Turns the `method` that a user passes into an instance, and checks its options.

    Raises:
        MethodError: The name is unknown, an option has a wrong value, or it is no method.
    """
    if isinstance(method, str):
        name, _, options = method.partition(":")
        if options and name in _METHODS:  # as on the command line
            raise MethodError(
                f"method is {shorten(method)}; expected a name alone, or an instance with options, "
                f"{_METHODS[name].__name__}({options})"
            )
        method = get(method)
    if isinstance(method, type) and issubclass(method, Method):
        method = method()
    if not isinstance(method, Method):
        raise MethodError(f"method is {shorten(method)}; expected a name, a Method class or an instance of one")
    check_options(method)
    return method
