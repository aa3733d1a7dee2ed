# SPDX-License-Identifier: Apache-2.0
"""Variants that a benchmark times: the unpruned model, the limits, and methods at budgets."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from ..core.budget import Budget
from ..errors import InputError
from ..methods import Method, resolve
from ..study.resize import NAME as RESIZE

ALWAYS = ("random", "pooling")
Kind = Literal["unpruned", "limit", "resize", "method"]


@dataclass(frozen=True)
class Variant:
    """A way to answer a prompt.

    Attributes:
        kind: "unpruned"; "limit", a prompt that has only the kept tokens; "resize", the unpruned model on smaller
            pictures of no more tokens; or "method".
        label: Name of its row.
        budget: Its budget; None for the unpruned model.
        method: Its method; None for other kinds.
    """

    kind: Kind
    label: str
    budget: Budget | None = None
    method: Method | None = None

    @property
    def key(self) -> str:
        """Name in a result file."""
        return self.label if self.budget is None else f"{self.label} {self.budget}"


def method_of(text: str) -> Method:
    """Parses `NAME` or `NAME:option=value,option=value`.

    Raises:
        InputError: The options cannot be parsed.
        MethodError: There is no such method, or it has no such option.
    """
    name, _, options = text.partition(":")
    values: dict[str, Any] = {}
    for part in _split(options):
        key, equals, value = part.partition("=")
        if not equals or not key.strip().isidentifier():
            raise InputError(f"cannot parse {part!r} in {text!r}; expected NAME:option=value,option=value")
        if key.strip() in values:
            raise InputError(f"{key.strip()} is given twice in {text!r}; expected each option once")
        try:
            values[key.strip()] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            values[key.strip()] = value
    cls = type(resolve(name))
    try:
        return resolve(cls(**values))
    except TypeError as error:
        raise InputError(f"{name} has no such options: {options!r} ({error}); vtprune methods lists them") from error


def _split(options: str) -> list[str]:
    """Parts between commas that are not inside brackets."""
    parts, depth = [""], 0
    for character in options:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part for part in parts if part]


def variants(methods: Iterable[str], budgets: Iterable[Budget]) -> list[Variant]:
    """All variants of a benchmark, in running order.

    Args:
        methods: Texts for `method_of`; `random` and `pooling` are always added.
        budgets: Budgets, each a `ratio` or `keep`.
    """
    chosen = {name: method_of(name) for name in dict.fromkeys([*ALWAYS, *methods])}
    found = [Variant("unpruned", "unpruned")]
    for budget in budgets:
        found += [Variant("limit", "limit", budget), Variant("resize", RESIZE, budget)]
        found += [Variant("method", name, budget, method) for name, method in chosen.items()]
    return found
