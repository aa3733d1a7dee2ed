# SPDX-License-Identifier: Apache-2.0
"""Extracts code blocks of documents and replaces names on the hub by local paths."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

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
    """Replaces names of models on the hub by the path of a local folder."""

    def swap(match: re.Match[str]) -> str:
        name = match[2]
        return match[0] if name.startswith(_MEDIA) or Path(name).exists() else repr(str(folder))

    return _STRING.sub(swap, code)
