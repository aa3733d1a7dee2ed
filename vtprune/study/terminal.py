# SPDX-License-Identifier: Apache-2.0
"""Text and tables for a terminal; a table that is too wide for it becomes a list."""

from __future__ import annotations

import errno
import os
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from rich.console import Console


def make_console(**options: Any) -> Console:
    """Makes a console that raises `BrokenPipeError` if its reader goes away, where rich ends the process with code 1.

    Args:
        options: Options of `rich.console.Console`.
    """
    from rich.console import Console

    class PipeConsole(Console):
        def on_broken_pipe(self) -> NoReturn:
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    return PipeConsole(**options)


def print_table(console: Console, title: str, headings: Sequence[str], *sections: Sequence[Sequence[str]]) -> None:
    """Prints a table; if it is wider than the terminal, every row as a block of lines.

    Args:
        console: Console to print to.
        title: One line; above a table truncated to its width.
        headings: Headings of the columns; the first column names the row.
        sections: Rows of cells; a line separates sections.
    """
    from rich.measure import Measurement
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title, no_wrap=True, overflow="ellipsis"), title_justify="left")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left", no_wrap=True)
    for rows in sections:
        for row in rows:
            table.add_row(*map(Text, row))
        table.add_section()
    if Measurement.get(console, console.options.update(width=1000), table).maximum <= console.width:
        console.print(table)
        return
    lines = wrap(title, console.width)
    for name, *cells in (row for rows in sections for row in rows):
        lines += ["", name or headings[0]]
        for heading, cell in zip(headings[1:], cells, strict=True):
            lines += wrap(f"{heading}: {cell}", console.width, "  ")
    console.print(Text("\n".join(lines)), soft_wrap=True)


def wrap(text: str, width: int, indent: str = "") -> list[str]:
    """Wraps text without breaking words such as `mean_ratio=0.2`."""
    options = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.wrap(text, max(width, 20), initial_indent=indent, subsequent_indent=indent + "  ", **options)  # type: ignore[arg-type]
