# SPDX-License-Identifier: Apache-2.0
"""Command-line parser with examples, suggestions for misspelled words, and one-line errors."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from ..errors import InputError

EXIT_CODES = """exit codes:
  0    done
  1    failure not caused by the input, such as a full disk or a bug in vtprune
  2    invalid input
  130  interrupted
  141  the reader of the output closed it"""


class Parser(argparse.ArgumentParser):
    """Argument parser whose help begins with examples and whose errors are exceptions.

    Args:
        examples: Command lines without the program name.
        options: Options of `argparse.ArgumentParser`.
    """

    def __init__(self, *positional: Any, examples: Sequence[str] = (), **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*positional, **options)
        self.examples = tuple(examples)
        # On every command, so that it can stand anywhere; no default, so that no parser overwrites another's value.
        self.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show an error's traceback")

    def format_help(self) -> str:
        examples = "".join(f"  vtprune {line}\n" for line in self.examples)
        return f"examples:\n{examples}\n{super().format_help()}" if examples else super().format_help()

    def _print_message(self, message: str, file: Any = None) -> None:
        # argparse ignores errors when it writes help.
        if message:
            (file or sys.stderr).write(message)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        # Here and not in parse_args, so that the error comes from the parser of the command.
        found, extra = super().parse_known_args(args, namespace)
        if extra:
            self.error(f"unrecognized arguments: {' '.join(extra)}{self._near_options(extra)}")
        return found, extra

    def error(self, message: str) -> NoReturn:
        wrong = re.match(r"argument .*: invalid choice: '(.*?)' \(choose from (.*)\)", message)
        if wrong:
            message = f"{message}{_did_you_mean(wrong[1], re.split(', ', wrong[2].replace(chr(39), '')))}"
        elif "unrecognized arguments" not in message and re.search(r"required: COMMAND", message):
            message = f"{message}; expected one of {', '.join(self.commands())}"
        raise InputError(f"{message} (see {self.prog} --help)")

    def commands(self) -> list[str]:
        """Names of the commands, in order."""
        return [name for action in self._actions if isinstance(action.choices, dict) for name in action.choices]

    def _near_options(self, extra: Iterable[str]) -> str:
        unknown = next((word for word in extra if word.startswith("-")), "")
        return _did_you_mean(unknown.split("=")[0], self._option_string_actions) if unknown else ""


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def description(text: str) -> str:
    """Wraps the description of a command."""
    return textwrap.fill(" ".join(text.split()), 88)
