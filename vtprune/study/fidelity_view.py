# SPDX-License-Identifier: Apache-2.0
"""Results of `vtprune fidelity` as a table for the terminal and as a chart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .charts import Chart, Series
from .resize import NAME
from .terminal import print_table

if TYPE_CHECKING:
    from rich.console import Console

NOTES = (
    "KL, top-1, last hidden state (cosine): of the token after the prompt; answer: greedy, word for word; all compared "
    "with the unpruned model. Attention error: relative, at the last cut. Time: to the first token, with vision tower "
    "and selection, relative to unpruned; * nothing is both faster and closer."
)
BESIDE = ("method", "ratio", "at equal tokens", "kept", "at no more time", "kept")
_HEADINGS = ("method", "kept", "KL (nats)", "top-1", "answer", "cosine", "attention error", "selection", "time")


def chart(data: dict[str, Any]) -> Chart:
    """Quality against measured time: a line per method, a point per ratio, the frontier behind them."""
    rows = [row for row in data["rows"] if "refused" not in row]
    series = []
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method]
        bars = [row["kl"]["interval"] or 2 * [row["kl"]["value"]] for row in mine]
        low, high = ([bar[end] for bar in bars] for end in (0, 1))
        series.append(
            Series(
                method, [row["relative_time"]["value"] for row in mine], [row["kl"]["value"] for row in mine], low, high
            )
        )
    best = [(row["relative_time"]["value"], row["kl"]["value"]) for row in rows if row["frontier"]]
    return Chart(
        title=_title(data),
        x_label=f"{'CPU ' if data['clock'] == 'cpu' else ''}time to the first token, selection included; unpruned = 1",
        y_label="KL of the next token, nats",
        series=series,
        frontier=sorted(point for point in best if point[1] > 0),
        log_y=True,
        mark=("unpruned", 1.0, None),
    )


def show(data: dict[str, Any], console: Console) -> None:
    """Prints a row per method and ratio, with intervals on wide terminals and fewer columns on narrow ones."""
    from rich.text import Text

    intervals = console.width >= 172
    shown = [0, 1, 2, 4, 8] if console.width < 100 else range(9)
    ran = [row for row in data["rows"] if "refused" not in row]
    sections = []
    for ratio in sorted({row["ratio"] for row in ran}, reverse=True):
        rows = sorted((row for row in ran if row["ratio"] == ratio), key=lambda row: row["kl"]["value"])
        cells = [_cells(row, intervals) for row in rows]
        sections.append([[row[number] for number in shown] for row in cells])
    print_table(console, _title(data), [_HEADINGS[number] for number in shown], *sections)
    _print_beside_resizing(ran, console)
    for row in refusals(data["rows"]):
        console.print(Text(f"{row['method']} at {row['ratio']:g}: {row['refused']}"))
    where = "In brackets" if intervals else "In the JSON file"
    console.print(Text(f"{where}: 95 % intervals. {NOTES}"), soft_wrap=True)


def _print_beside_resizing(rows: list[dict[str, Any]], console: Console) -> None:
    """Prints every row beside smaller pictures of as many tokens, and beside those that take no more time."""
    if not any(row.get("equal_tokens") or row.get("equal_time") for row in rows):
        return
    title = (
        "Beside smaller pictures: KL minus theirs (below 0 is nearer), and of the answers that they change, those kept"
    )
    ordered = sorted(rows, key=lambda row: (-row["ratio"], row["kl"]["value"]))
    print_table(console, title, BESIDE, [beside_resizing(row) for row in ordered if row["method"] != NAME])


def refusals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that could not run; of resizing the first alone, because a fixed grid cannot be resized at any ratio."""
    refused = [row for row in rows if "refused" in row]
    resized = [row for row in refused if row["method"] == NAME]
    return [row for row in refused if row["method"] != NAME] + resized[:1]


def beside_resizing(row: dict[str, Any]) -> tuple[str, ...]:
    """Cells of a row beside resized pictures, under the headings `BESIDE`."""
    cells = [row["method"], f"{row['ratio']:g}"]
    for name in ("equal_tokens", "equal_time"):
        other = row.get(name)
        if other is None:
            cells += ["-", "-"]
            continue
        low, high = other["kl"]["interval"] or 2 * [other["kl"]["value"]]
        at = f", at {other['ratio']:g}" if name == "equal_time" else ""
        cells.append(f"{other['kl']['value']:+.2g} ({low:+.2g} to {high:+.2g}){at}")
        cells.append(f"{other['kept']} of {other['changed']}")
    return tuple(cells)


def _title(data: dict[str, Any]) -> str:
    counts = {what: data[f"{what}s"] for what in ("picture", "prompt")}
    pictures, prompts = (f"{count} {what}{'s' * (count != 1)}" for what, count in counts.items())
    return f"{data['model']}, {pictures} ({data['of']}), {prompts}"


def _cells(row: dict[str, Any], intervals: bool) -> list[str]:
    def span(number: dict[str, Any], form: str) -> str:
        shown = f"{number['value']:{form}}"
        if not intervals or number["interval"] is None:
            return shown
        low, high = number["interval"]
        return f"{shown} ({low:{form}}–{high:{form}})"

    return [
        row["method"],
        f"{row['kept']:.0f} of {row['visual']:.0f}",
        span(row["kl"], ".2g"),
        span(row["top1"], ".0%"),
        span(row["answers"], ".0%"),
        span(row["cosine"], ".3f"),
        span(row["attention_error"], ".2f") if "attention_error" in row else "-",
        f"{1e3 * row['selection_seconds']:.1f} ms",
        f"{'* ' if row['frontier'] else ''}{span(row['relative_time'], '.2f')}",
    ]
