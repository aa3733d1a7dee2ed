# SPDX-License-Identifier: Apache-2.0
"""Code blocks of documents, and how those in Python are run: `docs/extend/docs.md` states the rules in words."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
_BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```[ ]*$", re.S | re.M)
_STRING = re.compile(r"""(["'])([\w-][\w.-]*/[\w-][\w.-]*)\1""")
_MEDIA = ("image/", "text/", "application/", "video/")


class Block(NamedTuple):
    language: str
    code: str
    line: int


def blocks(text: str) -> list[Block]:
    """All fenced blocks of a document, with the line that each begins at."""
    return [Block(m[1], m[2], text[: m.start()].count("\n") + 1) for m in _BLOCK.finditer(text)]


def offline(code: str, folder: Path) -> str:
    """Python code in which names of models on the hub are the path of a local folder."""

    def swap(match: re.Match[str]) -> str:
        name = match[2]
        return match[0] if name.startswith(_MEDIA) or Path(name).exists() else repr(str(folder))

    return _STRING.sub(swap, code)


def run_python(block: Block, scope: dict[str, Any], folder: Path, page: str) -> None:
    """Runs a block in the session of its page; a traceback names the page and its line there."""
    code = "\n" * block.line + offline(block.code, folder)
    exec(compile(code, page, "exec"), scope)


def save_as(blocks: list[Block], text: str, folder: Path) -> None:
    """Writes the last block into the file that the sentence before it names, "Save this as `NAME`", if it does."""
    before = "\n".join(text.splitlines()[: blocks[-1].line - 1]).rsplit("```", 1)[-1]
    name = re.search(r"[Ss]ave this as\s+`([\w.]+)`", before)
    if name:
        (folder / name[1]).write_text(blocks[-1].code, encoding="utf-8")
