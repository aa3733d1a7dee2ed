# SPDX-License-Identifier: Apache-2.0
"""Table of a benchmark for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ..study.terminal import print_table
from . import summary

if TYPE_CHECKING:
    from rich.console import Console

_COLUMNS = (
    "",
    "kept",
    "vision",
    "selection",
    "prefill",
    "speed-up",
    "of the gain",
    "FLOPs bound",
    "per token",
    "end to end",
    "speed-up",
    "peak",
    "KV",
)
_EXPLAINED = (
    "Medians in milliseconds over alternating runs (prefill: minimum to maximum in brackets). "
    "limit: the same model on a prompt that has only the kept tokens. "
    "resize: the unpruned model on smaller pictures, whose tower has less to do, too; methods keep as many tokens. "
    "of the gain: achieved share of the prefill time between unpruned and the limit. "
    "FLOPs bound: prefill time if it were proportional to FLOPs."
)


def show(data: Mapping[str, Any], console: Console, cpu: bool = False) -> None:
    """Prints a table for every setting of a result, and below it the variants that do not pay or were refused.

    Args:
        data: Return value of `vtprune.bench.measure.run`.
        console: Console to print to.
        cpu: Use CPU time of the process instead of wall-clock time.
    """
    from rich.text import Text

    for name, setting in data["settings"].items():
        if setting.get("refused"):
            console.print(Text(f"{data['model']}, {name}: {setting['refused']}"))
            continue
        mine = summary.rows_of(setting, data["variants"], cpu)
        print_table(console, _title(data, name, mine), _COLUMNS, [_cells(row) for row in mine])
        for line in notes(mine):
            console.print(Text(line))
    clock = " All times are CPU times of the process." if cpu else ""
    console.print(Text(_EXPLAINED + clock))


def notes(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Notes on rows that do not pay, were refused, or differ from the KV formula."""
    bound = next((row["first_token_bound"] for row in rows if "first_token_bound" in row), None)
    gains = [f"{r['variant']} {r['speedup_first_token']:.2f} x" for r in rows if r.get("speedup_first_token")]
    if bound is not None and len(gains) > 1:
        yield (
            f"first token, vision tower included: {', '.join(gains[1:])} as fast as unpruned; pruning the decoder "
            f"alone can give at most {bound:.2f} x"
        )
    for row in rows:
        if "refused" in row:
            yield f"{row['variant']}: {row['refused']}"
        elif row.get("verdict"):
            yield f"{row['variant']}: {row['verdict']}"
        if row.get("kv_bytes") != row.get("kv_bytes_formula"):
            found, formula = row["kv_bytes"], row["kv_bytes_formula"]
            yield f"{row['variant']}: the KV cache has {found:,} bytes, its formula gives {formula:,} bytes"


def _title(data: Mapping[str, Any], name: str, rows: list[dict[str, Any]]) -> str:
    some = next((row for row in rows if "refused" not in row), None)
    tokens = f"{some['visual']:,} visual and {some['text']:,} text tokens a sample, " if some else ""
    return f"{data['model']}, {name}: {tokens}{data['dtype']}, {data['attention']}, {data['device']}"


def _cells(row: dict[str, Any]) -> list[str]:
    """Cells of a row under the headings `_COLUMNS`."""
    if "refused" in row:
        return [row["variant"], *["-"] * (len(_COLUMNS) - 1)]
    prefill = row["prefill"]
    pays = "" if not row.get("verdict") else " (no)"
    return [
        row["variant"],
        f"{row['kept']:,}",
        _ms(row["vision"]),
        _ms(row["decision"]),
        f"{_ms(prefill)} ({1e3 * prefill['low']:.0f} to {1e3 * prefill['high']:.0f})",
        _times(row.get("speedup")),
        "-" if row.get("gain") is None else f"{row['gain']:.0%}{pays}",
        "-" if "flops_bound" not in row else f"{1e3 * row['flops_bound']:.1f}",
        _ms(row["token"]),
        _ms(row["end_to_end"]),
        _times(row.get("speedup_end_to_end")),
        _size(row["peak_bytes"]),
        _size(row["kv_bytes"]),
    ]


def _ms(spread: Mapping[str, float] | None) -> str:
    return "-" if not spread else f"{1e3 * spread['median']:.1f}"


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} x"


def _size(number: float | None) -> str:
    if number is None:
        return "-"
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 else f"{number / 2**20:.1f} MiB"
