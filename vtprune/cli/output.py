# SPDX-License-Identifier: Apache-2.0
"""Output of a command: text, tables and JSON; with `--json -` only the JSON goes to standard output."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core import files
from ..errors import InputError
from ..study.terminal import make_console, print_table

if TYPE_CHECKING:
    from rich.console import Console

WIDE = 220  # columns if the output is not a terminal, so that nothing is cut off


def add_json(parser: argparse.ArgumentParser, what: str, default: str | None = None) -> None:
    """Adds `--json [FILE]`, without a file or with `-` for standard output, and `--force`."""
    shown = f"; default: {default}" if default else ""
    text = f"write {what} as JSON; FILE - or none is standard output, and the rest goes to standard error{shown}"
    parser.add_argument("--json", nargs="?", const="-", default=default, metavar="FILE", help=text)
    parser.add_argument("--force", action="store_true", help="overwrite files that exist")


class Output:
    """Output of a command.

    Args:
        args: Arguments of the command; `json` is the JSON file, `-` for standard output, None for no JSON; `force`
            allows it to overwrite files.
        resumes: The command goes on from its JSON file, and checks by itself whether it may.

    Raises:
        InputError: The JSON file cannot be written, see `claim`.
    """

    def __init__(self, args: argparse.Namespace, resumes: bool = False) -> None:
        self.json: str | None = args.json
        self.to_stdout = self.json == "-"
        self._force: bool = args.force
        self._claimed: set[Path] = set()
        if self.json is not None and not self.to_stdout:
            self.claim(self.json, lambda path: resumes)

    @property
    def file(self) -> Path | None:
        """The JSON file; None without one, or for standard output."""
        return Path(self.json).expanduser() if self.json is not None and not self.to_stdout else None

    def claim(self, path: str | Path, may_replace: Callable[[Path], bool] = lambda path: False) -> Path:
        """Checks before any long work that a file can be written, and returns its path.

        Args:
            path: File that the command is going to write.
            may_replace: Whether an existing file may be replaced without `--force`.

        Raises:
            InputError: Its folder does not exist, it is a folder, it exists, or the command writes it twice.
        """
        if str(path) in ("-", ""):
            raise InputError(f"found {str(path)!r} as a file to write; expected a name (only --json takes -)")
        place = Path(path).expanduser()
        if not place.absolute().parent.is_dir():
            raise InputError(f"cannot write {path}: its folder does not exist")
        if place.is_dir():
            raise InputError(f"cannot write {path}: it is a folder")
        if place.resolve() in self._claimed:
            raise InputError(f"two results would be written to {path}; expected a file for each")
        self._claimed.add(place.resolve())
        if place.is_file() or not place.exists():
            try:  # asking for permissions would miss file systems that are mounted read-only
                tempfile.TemporaryFile(dir=place.parent).close()
            except OSError as error:
                raise InputError(f"cannot write {path}: {error.strerror} in its folder") from error
        if place.is_file() and not self._force and not may_replace(place):
            raise InputError(f"{path} exists; use --force to overwrite it, or name another file")
        return place

    def claim_chart(self, path: str | Path) -> Path:
        """Same as `claim` for a chart, which replaces another chart.

        Raises:
            InputError: The ending of the name is not that of a chart.
            VTPruneError: matplotlib is not installed.
        """
        from ..study import charts

        charts.check(path)
        return self.claim(path, lambda found: b"matplotlib" in found.read_bytes().lower())

    def console(self) -> Console:
        """Console for text: standard output, or standard error if the JSON goes to standard output."""
        stream = sys.stderr if self.to_stdout else sys.stdout
        # Without a terminal and without COLUMNS nothing is cut off; rich would take a COLUMNS of 0 as no width at all.
        given = os.environ.get("COLUMNS", "")
        is_set = given.isdigit() and int(given) > 0
        width = shutil.get_terminal_size().columns if stream.isatty() or is_set else WIDE
        return make_console(stderr=self.to_stdout, width=width)

    def say(self, text: str) -> None:
        """Prints text."""
        print(text, file=sys.stderr if self.to_stdout else sys.stdout, flush=True)

    def table(self, title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Prints a table; if it is wider than the terminal, every row as a block of lines.

        Args:
            title: One line, truncated if too long.
            headings: Headings of the columns; the first column names the row.
            rows: Cells of each row.
        """
        print_table(self.console(), title, headings, rows)

    def write(self, data: Any) -> None:
        """Writes the JSON, if requested."""
        if self.json is None:
            return
        text = json.dumps(data, indent=1, allow_nan=False) + "\n"
        if self.to_stdout:
            sys.stdout.write(text)
            return
        files.write_text(self.json, text)
        self.say(f"JSON written to {self.json}")


def width() -> int:
    """Columns of the terminal, at most 100; 80 without a terminal."""
    return min(100, shutil.get_terminal_size((80, 24)).columns)


def plural(number: int, what: str) -> str:
    """A number and a noun: `1 run`, `3 runs`."""
    return f"{number:,} {what}{'s' * (number != 1)}"
