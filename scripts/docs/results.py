# SPDX-License-Identifier: Apache-2.0
"""The page of results on the site: a summary, and a page for each of its sections with all numbers."""

from __future__ import annotations

import re

from scripts.docs.tables import ROOT

SOURCE = "docs/results.md"
ROWS = 5  # rows of a section's first table in the summary
_CHART = re.compile(r"(?<!\[)!\[([^\]]*)\]\((?!\S*badges/)([^)\s]+\.svg)\)")
_PICTURE = re.compile(r"(?<!\[)!\[([^\]]*)\]\(([^)\s]+\.png)\)")


def sections() -> tuple[str, dict[str, str]]:
    """The text before the first section, and the sections by title."""
    intro, *parts = re.split(r"^## ", (ROOT / SOURCE).read_text(encoding="utf-8"), flags=re.M)
    return intro, {title.strip(): body.strip() for title, _, body in (part.partition("\n") for part in parts)}


def place(title: str) -> str:
    """The path of a section's page."""
    return f"results/{re.sub(r'[^a-z0-9]+', '-', title.lower()).strip('-')}.md"


def page(title: str) -> str:
    """Markdown of a section's page."""
    return f"# {title}\n\n{sections()[1][title]}\n"


def summary() -> str:
    """Markdown of the results page: for every section its chart, the best rows of its first table, and a link."""
    intro, parts = sections()
    out = [intro.strip()]
    for title, body in parts.items():
        out.append(f"## {title}")
        chart = _CHART.search(body)
        if chart:
            out.append(chart[0])
        out += [*_first_table(body), f"[All numbers: {title}](/{place(title)})"]
    return "\n\n".join(out) + "\n"


def _first_table(body: str) -> list[str]:
    """The paragraph before a section's first table, and the table's first rows."""
    blocks = [block for block in re.split(r"\n{2,}", body) if not block.startswith(("From ", "!["))]
    number = next((n for n, block in enumerate(blocks) if block.startswith("|")), None)
    if number is None:
        return blocks[:1]
    lines = blocks[number].splitlines()
    more = len(lines) - 2 - ROWS
    shown = ["\n".join(lines[: 2 + ROWS])]
    before = [blocks[number - 1]] if number and not blocks[number - 1].startswith("#") else []
    return [*before, *shown, *([f"and {more} more rows."] if more > 0 else [])]


def linked(text: str) -> str:
    """Makes every chart and every other picture but badges a link to its file; the last step, on the complete page."""
    text = _CHART.sub(r"[![\1](\2)](\2){.chart}", text)
    return _PICTURE.sub(r"[![\1](\2)](\2)", text)
