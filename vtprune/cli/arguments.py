# SPDX-License-Identifier: Apache-2.0
"""Types of command-line arguments, and what several commands share."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError, one_line

if TYPE_CHECKING:
    pass

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..methods import Method


def chosen_methods(names: Sequence[str] | None) -> dict[str, Method]:
    """Methods by label: registered names and strategy files of `vtprune tune`; all that prune pictures for None."""
    from .. import methods
    from ..methods.vflowopt.method import VFlowOpt

    chosen: dict[str, Method] = {}
    for name in names or methods.for_pictures():
        if name.endswith(".json"):
            chosen[Path(name).name] = VFlowOpt.load(Path(name).expanduser())
        else:
            chosen[name] = methods.get(name)()
    return chosen


def check_folder(path: str) -> None:
    """Refuses a file that cannot be written before anything long is begun."""
    place = Path(path).expanduser().absolute()
    if not place.parent.is_dir():
        raise InputError(f"cannot write {path}: its folder does not exist")
    if place.is_dir():
        raise InputError(f"cannot write {path}: it is a folder")


def write(path: str, text: str) -> None:
    try:
        Path(path).expanduser().write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {path}: {one_line(error)}") from error


def share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share of tokens to keep; expected a number in (0, 1]")
    return value


def probability(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no probability; expected a number above 0 and below 1")
    return value


def ratio(text: str) -> float | str:
    """A share, or `auto`."""
    return text if text == "auto" else share(text)


def count(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a count; expected a whole number of at least 1")
    return value


def words(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty; expected a question")
    return text


def quiet() -> None:
    """Keeps the progress bars and hints of transformers and the hub out of a command's output."""
    from huggingface_hub.utils import logging as hub
    from transformers.utils import logging as hf

    hub.set_verbosity_error()
    hf.set_verbosity_error()
    hf.disable_progress_bar()


def as_dtype(value: Any, dtype: Any) -> Any:
    """Pixels in the model's dtype; ids, masks and sizes as they are."""
    return value.to(dtype) if hasattr(value, "is_floating_point") and value.is_floating_point() else value
