# SPDX-License-Identifier: Apache-2.0
"""Numbers and tables as Markdown, for every page that is rendered from results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; bars inside cells are escaped."""
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


# The row of `benchmarks.accuracy` whose cut is given: other methods beat it, so it is no upper bound.
ANSWER_PATCHES = "answer patches (input cut)"


def method_label(name: str) -> str:
    """A method as tables show it."""
    return ANSWER_PATCHES if name == "oracle" else f"`{name}`"


def percent(row: dict[str, Any]) -> str:
    """`right` of `total`."""
    return f"{100 * row['right'] / row['total']:.1f} %"


def span(interval: Sequence[float] | None, form: str = ".1f", scale: float = 1.0) -> str:
    """An interval as ` (low-high)`, or nothing where there is none."""
    if interval is None:
        return ""
    low, high = (f"{scale * bound:{form}}" for bound in interval)
    return f" ({low}–{high})"


def estimate(number: dict[str, Any] | None, form: str, scale: float = 1.0) -> str:
    """A `value` with its `interval`."""
    return "" if number is None else f"{scale * number['value']:{form}}{span(number.get('interval'), form, scale)}"


def versions(data: dict[str, Any]) -> str:
    """Versions, machine and its load in brackets."""
    names = [f"{name} {version}" for name, version in data.get("versions", {}).items() if version is not None]
    parts = [", ".join(names), *([data["machine"]] if "machine" in data else [])]
    if data.get("load") is not None:
        parts.append(f"load up to {data['load']:.1f}")
    return f"({'; '.join(parts)})"


def seconds(number: float | None) -> str:
    """A time in the unit that suits it."""
    if number is None:
        return ""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if number >= size or unit == "µs":
            return f"{number / size:.3g} {unit}"
    raise AssertionError
