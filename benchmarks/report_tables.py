# SPDX-License-Identifier: Apache-2.0
"""Formatting of numbers and tables as Markdown, for all pages rendered from results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

from vtprune import refvlm


def table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; bars inside cells are escaped."""
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


# Label of the `oracle` row of `benchmarks.accuracy`; not an upper bound, because other methods beat it.
ANSWER_PATCHES = "answer patches (input cut)"


def method_label(name: str) -> str:
    """Label of a method in tables."""
    return ANSWER_PATCHES if name == "oracle" else f"`{name}`"


def percent(row: dict[str, Any]) -> str:
    """`right` of `total` in percent."""
    return f"{100 * row['right'] / row['total']:.1f} %"


def span(interval: Sequence[float] | None, form: str = ".1f", scale: float = 1.0) -> str:
    """An interval as ` (low-high)`, or an empty string."""
    if interval is None:
        return ""
    low, high = (f"{scale * bound:{form}}" for bound in interval)
    return f" ({low}–{high})"


def right_share(row: dict[str, Any], form: str = ".1f") -> str:
    """`right` of `total` in percent, with the `interval`."""
    return f"{percent(row)}{span(row['interval'], form, 100)}"


def estimate(number: dict[str, Any] | None, form: str, scale: float = 1.0) -> str:
    """A `value` with its `interval`."""
    return "" if number is None else f"{scale * number['value']:{form}}{span(number.get('interval'), form, scale)}"


def versions(data: dict[str, Any]) -> str:
    """Versions, machine and its load in brackets."""
    names = [f"{name} {version}" for name, version in data.get("versions", {}).items() if version is not None]
    parts = [", ".join(names), *([data["machine"]] if "machine" in data else [])]
    if data.get("load") is not None:
        parts.append(f"load up to {data['load']:.1f}")
    parts += [f"**earlier weights of the built-in {name}**" for name in earlier_weights(data)]
    return f"({'; '.join(parts)})"


@lru_cache(maxsize=1)
def _weights() -> dict[str, str]:
    """SHA-256 of the weights of each built-in model."""
    return {name: refvlm.weights_sha256(name) for name in refvlm.MODELS}


def earlier_weights(data: dict[str, Any]) -> list[str]:
    """Built-in models whose weights in the package differ from those of the results."""
    now, found = _weights(), data.get("weights_sha256")
    if isinstance(found, str):
        name = str(data.get("model", "model")).removeprefix("embedded-").replace("embedded", "llava")
        return [] if found in now.values() else [name]
    return [name for name, value in (found or {}).items() if value != now.get(name)]


def seconds(number: float | None) -> str:
    """A time with a suitable unit."""
    if number is None:
        return ""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if number >= size or unit == "µs":
            return f"{number / size:.3g} {unit}"
    raise AssertionError
