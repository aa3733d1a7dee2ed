# SPDX-License-Identifier: Apache-2.0
"""Draws the README's badges from pyproject.toml into docs/badges, so that none is loaded from another site.

python scripts/draw_badges.py
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "badges"
WIDTH = 6.6  # pixels per character at this font size


def facts() -> dict[str, str]:
    """Values of the badges by name."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")

    def find(pattern: str) -> str:
        found = re.search(pattern, text, re.M)
        if found is None:
            raise SystemExit(f"pyproject.toml has no line {pattern}")
        return found[1]

    return {
        "license": find(r'^license = "(.+)"'),
        "python": find(r'^requires-python = "(.+)"'),
        "torch": find(r'^ *"torch(>=.+)"'),
        "transformers": find(r'^ *"transformers(>=.+)"'),
    }


def badge(name: str, value: str) -> str:
    """An SVG picture of one badge."""
    left, right = (round(WIDTH * len(text) + 12) for text in (name, value))
    value = value.replace("<", "&lt;").replace(">", "&gt;")
    style = 'font-family="Verdana,DejaVu Sans,sans-serif" font-size="11" fill="#fff" text-anchor="middle"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + right}" height="20" role="img">'
        f"<title>{name}: {value}</title>"
        f'<rect width="{left + right}" height="20" rx="3" fill="#1f4e5f"/>'
        f'<path d="M3 0h{left - 3}v20H3a3 3 0 0 1-3-3V3a3 3 0 0 1 3-3z" fill="#555"/>'
        f'<text x="{left / 2:g}" y="14" {style}>{name}</text>'
        f'<text x="{left + right / 2:g}" y="14" {style}>{value}</text></svg>\n'
    )


def main() -> None:
    """Writes one SVG file per badge."""
    FOLDER.mkdir(exist_ok=True)
    for name, value in facts().items():
        (FOLDER / f"{name}.svg").write_text(badge(name, value), encoding="utf-8")


if __name__ == "__main__":
    main()
