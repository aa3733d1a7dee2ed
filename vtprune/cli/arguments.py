# SPDX-License-Identifier: Apache-2.0
"""Types of command-line arguments, and arguments shared by several commands."""

from __future__ import annotations

import argparse
import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..refvlm.loading import EMBEDDED, EMBEDDED_MODELS

if TYPE_CHECKING:
    from ..methods import Method

MAX_QUESTION = 100_000  # characters; far more than the context length of models
MODEL_HELP = f"a local folder, a name on the hub, or a model inside the package: {' or '.join(EMBEDDED_MODELS)}"


def chosen_methods(names: Sequence[str] | None) -> dict[str, Method]:
    """Methods by label; for None, all for pictures.

    Args:
        names: Registered names, also with options (`fastv:layer=3`), and strategy files of `vtprune tune`.
    """
    from .. import methods
    from ..bench.variants import method_of
    from ..methods.vflowopt.method import VFlowOpt

    chosen: dict[str, Method] = {}
    names = names or methods.for_pictures()
    files = {name for name in names if name.endswith(".json")}
    short = Counter(Path(name).name for name in files)
    for name in names:
        if name in files:
            label = Path(name).name if short[Path(name).name] == 1 else name
            chosen[label] = VFlowOpt.load(Path(name).expanduser())
        else:
            chosen[name] = method_of(name)
    return chosen


def add_model(parser: argparse.ArgumentParser, required: bool = False) -> None:
    """Adds `--model`."""
    default = None if required else EMBEDDED
    text = MODEL_HELP if required else f"{MODEL_HELP} (default: {default})"
    parser.add_argument("--model", required=required, default=default, metavar="NAME_OR_FOLDER", help=text)


def add_pictures(parser: argparse.ArgumentParser) -> None:
    """Adds `--images`, and the group of `--question` and `--questions`."""
    parser.add_argument(
        "--images", "--image", metavar="FOLDER_OR_FILE", help="pictures (default: scenes that vtprune draws)"
    )
    questions = parser.add_mutually_exclusive_group()
    questions.add_argument("--question", type=words, metavar="TEXT", help="asked about every picture")
    questions.add_argument("--questions", metavar="FILE", help="a question per line; - is standard input")
    parser.add_argument("--limit", type=count, metavar="N", help="the first N pictures (default: all; 24 scenes)")


def add_device(parser: argparse.ArgumentParser) -> None:
    """Adds `--device` and `--dtype`."""
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... (default: the accelerator if there is one)")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16, ... (default: as stored)")


def _number(text: str) -> float:
    """The number that a text stands for; NaN for other text."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def share(text: str, of: str = "tokens") -> float:
    """Parses a share of visual tokens to keep, in (0, 1]."""
    value = _number(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a share of {of} to keep; expected a number in (0, 1]")
    return value


def patches(text: str) -> float:
    """Parses a share of the patches that the vision tower keeps, in (0, 1]."""
    return share(text, "patches")


def probability(text: str) -> float:
    """Parses a number in (0, 1)."""
    value = _number(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a probability; expected a number above 0 and below 1")
    return value


def ratio(text: str) -> float | str:
    """Parses a share, or `auto`."""
    return text if text == "auto" else share(text)


def count(text: str) -> int:
    """Parses a whole number of at least 1."""
    value = int(text) if re.fullmatch(r"[0-9]{1,9}", text) else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a count; expected a whole number of at least 1")
    return value


def words(text: str) -> str:
    """Checks a question."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the text is empty; expected a question")
    if len(text) > MAX_QUESTION:
        raise argparse.ArgumentTypeError(f"the text has {len(text):,} characters; expected at most {MAX_QUESTION:,}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("the text is not valid UTF-8; expected a question in it") from None
    return text


def short(text: str, limit: int = 60) -> str:
    """The text on one line of at most `limit` characters, for titles."""
    line = " ".join(text.split())
    return line if len(line) <= limit else f"{line[: limit - 3]}..."


def quiet() -> None:
    """Turns off the progress bars and hints of transformers and the hub."""
    from huggingface_hub.utils import logging as hub
    from transformers.utils import logging as hf

    hub.set_verbosity_error()
    hf.set_verbosity_error()
    hf.disable_progress_bar()
