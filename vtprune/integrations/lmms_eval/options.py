# SPDX-License-Identifier: Apache-2.0
"""Parsing of `--model_args` into a method and a budget."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from ... import methods
from ...core.options import Positive, fits, in_words, shorten
from ...errors import BudgetError, MethodError, VTPruneError
from ...methods import Method
from ...methods.vflowopt.method import VFlowOpt

UNPRUNED = "none"
# Types of the arguments that the plug-in reads itself, after lmms-eval has parsed numbers and booleans.
ARGUMENTS: dict[str, Any] = {
    **dict.fromkeys(("pretrained", "method", "dtype"), str),
    **dict.fromkeys(("device", "attn_implementation", "system_prompt", "reasoning_prompt"), str | None),
    **dict.fromkeys(("square", "use_cache"), bool),
}
# Types of the generation options of a task that are followed.
GENERATION: dict[str, Any] = {
    **dict.fromkeys(("max_new_tokens", "max_gen_toks"), Positive | None),
    "num_beams": Positive,
    **dict.fromkeys(("temperature", "top_p"), float | None),
    "do_sample": bool | None,
    "until": str | list | None,
}


class ArgumentError(VTPruneError, ValueError):
    """An argument in `--model_args` that the plug-in does not take, or one that others rule out."""


def check(given: Mapping[str, Any], types: Mapping[str, Any]) -> None:
    """Raises `ArgumentError` if a value does not have its type."""
    for name, hint in types.items():
        if name in given and not fits(given[name], hint):
            raise ArgumentError(f"{name} is {shorten(given[name])}; expected {in_words(hint)}")


def method(name: str, options: Mapping[str, Any], taken: tuple[str, ...]) -> Method | None:
    """Creates the method of a run, or None for an unpruned one.

    Args:
        name: A registered name, `none`, or a `.json` file with a strategy of VFlowOpt that `vtprune tune` wrote.
        options: The arguments that the plug-in itself does not take: options of the method. A method as an option, such
            as `host=pyramiddrop`, is given by name; a list, such as `layers=[7, 9]`, as JSON.
        taken: The arguments that the plug-in takes, for the message.

    Raises:
        ArgumentError: An option that the method does not have.
        MethodError: No such method, or a bad value.
    """
    stored = name.endswith(".json")
    cls = None if name == UNPRUNED else VFlowOpt if stored else methods.get(name)
    fields: dict[str, dataclasses.Field] = {}
    if cls is not None and dataclasses.is_dataclass(cls):
        fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    for option in options:
        if option not in fields:
            known = f"the method {name} has {', '.join(fields)}" if fields else f"the method {name} has no options"
            raise ArgumentError(f"unknown model argument {option}; vtprune takes {', '.join(taken)}, and {known}")
    if cls is None:
        return None
    values = {option: _value(fields[option], value) for option, value in options.items()}
    try:
        return VFlowOpt.load(name, **values) if stored else cls(**values)
    except TypeError as error:
        raise MethodError(f"method {name} cannot be made with {values}: {error}") from error


def budget(name: str, **given: Any) -> dict[str, Any]:
    """The one budget among `ratio`, `keep` and `mean_ratio`; none for an unpruned run.

    Raises:
        BudgetError: None or several for a method, or one for no method.
    """
    found = {key: value for key, value in given.items() if value is not None}
    wanted = 0 if name == UNPRUNED else 1
    if len(found) == wanted:
        return found
    had = " and ".join(found) or "none of them"
    if not wanted:
        raise BudgetError(f"method=none runs the model unpruned, but there is {had}; leave it out or name a method")
    raise BudgetError(f"expected one of ratio, keep and mean_ratio in model_args, found {had}; method=none is unpruned")


def _value(field: dataclasses.Field, value: Any) -> Any:
    """Parses lists and names of methods; lmms-eval has parsed numbers and booleans."""
    if isinstance(value, str) and value.startswith("["):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ArgumentError(f"{field.name}={value} is not a JSON list: {error}") from error
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, str) and "Method" in str(field.type):
        return methods.get(value)()
    return value
