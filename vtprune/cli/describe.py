# SPDX-License-Identifier: Apache-2.0
"""`vtprune methods` and `vtprune inspect`: the pruning methods, and the parts of a model that pruning uses."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from ..study.terminal import wrap
from .arguments import add_model, quiet
from .output import Output, add_json, width
from .parser import description

LAYERS = 32  # depth of the decoder for which cuts are shown


def add(commands: Any) -> None:
    """Adds the commands to the subparsers of the command line."""
    listing = commands.add_parser(
        "methods",
        help="list the pruning methods, where they cut, and their options",
        description=description(f"Lists the pruning methods, with their cuts in a decoder of {LAYERS} layers."),
        examples=("methods", "methods --json -"),
    )
    add_json(listing, "the list")
    listing.set_defaults(command=_methods)

    look = commands.add_parser(
        "inspect",
        help="show the parts of a model that pruning uses",
        description=description("Finds the parts of a model that pruning uses, from its configuration alone."),
        examples=("inspect --model OWNER/NAME",),
    )
    add_model(look)
    add_json(look, "the parts")
    look.set_defaults(command=_inspect)


def _methods(args: argparse.Namespace) -> None:
    output = Output(args)
    found = list_methods()
    lines = []
    for method in found:
        cuts = ", ".join("input" if layer == 0 else str(layer) for layer in method["cuts_before_layers"])
        options = ", ".join(f"{name}={value!r}" for name, value in method["options"].items())
        lines += wrap(f"{method['name']} (cuts before layer: {cuts})", width())
        lines += wrap(method["summary"], width(), "  ")
        lines += [*wrap(f"options: {options}", width(), "  "), ""] if options else [""]
    output.say("\n".join(lines).rstrip())
    output.write({"decoder_layers": LAYERS, "methods": found})


def list_methods() -> list[dict[str, Any]]:
    """Name, cuts, summary and options of every registered method."""
    from .. import methods

    found = []
    for name in methods.names():
        cls = methods.get(name)
        method = cls()
        fields: tuple[dataclasses.Field, ...] = dataclasses.fields(method) if dataclasses.is_dataclass(method) else ()
        found.append(
            {
                "name": name,
                "cuts_before_layers": [stage.layer for stage in method.schedule(LAYERS)],
                "summary": " ".join((cls.__doc__ or "").strip().split("\n\n")[0].split()),
                "options": {field.name: _plain(getattr(method, field.name)) for field in fields if field.init},
            }
        )
    return found


def _plain(value: Any) -> Any:
    """Converts a value to a JSON type; unknown types become text."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else repr(value)


def _inspect(args: argparse.Namespace) -> None:
    from ..engine.patching import inspect
    from ..refvlm import loading

    output = Output(args)
    loading.is_local(args.model)
    quiet()
    parts = inspect(loading.skeleton(args.model))
    output.say(str(parts))
    named = dict(line.split(None, 1) for line in str(parts).splitlines())
    output.write({"model": args.model, "layers": parts.num_layers, "parts": named})
