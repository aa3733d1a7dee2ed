# SPDX-License-Identifier: Apache-2.0
"""Results of `benchmarks.serving` as tables: medians over rounds, relative to the unpruned server at the same load."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.report_tables import seconds, table, versions

Data = dict[str, Any]
UNPRUNED = "unpruned"
LOAD = (
    "clients",
    "variant",
    "prompt tokens",
    "requests/s",
    "first token",
    "95 %",
    "per further token",
    "peak of the KV cache",
)
PARTS = ("asked", "variant", "preparing images", "vision", "selection", "decoder", "all", "selection's share")


def load_rows(data: Data) -> list[tuple[str, ...]]:
    """A row per number of clients and variant: values, and in brackets their ratio to the unpruned ones."""
    found = []
    for clients in sorted({row["concurrency"] for row in data["rows"]}):
        mine = [row for row in data["rows"] if row["concurrency"] == clients]
        base = medians([row for row in mine if row["variant"] == UNPRUNED])
        for variant in dict.fromkeys(row["variant"] for row in mine):
            own = medians([row for row in mine if row["variant"] == variant])
            cells = (
                _beside(own, base, "prompt_tokens", ",.0f"),
                _beside(own, base, "requests_per_second", ".2f"),
                _beside(own, base, "first"),
                _beside(own, base, "first_p95"),
                _beside(own, base, "token"),
                _beside(own, base, "peak_kv_tokens", ",.0f"),
            )
            found.append((str(clients), variant, *cells))
    return found


def medians(rows: Sequence[Data]) -> dict[str, float]:
    """Medians over rounds by name; empty without rows."""
    if not rows:
        return {}
    names = ("prompt_tokens", "requests_per_second", "peak_kv_tokens")
    found = {name: statistics.median(row[name] for row in rows) for name in names}
    for name in ("first", "token"):
        found[name] = statistics.median(row[name]["median"] for row in rows)
    found["first_p95"] = statistics.median(row["first"]["p95"] for row in rows)
    return found


def _beside(own: dict[str, float], base: dict[str, float], name: str, form: str | None = None) -> str:
    shown = seconds(own[name]) if form is None else f"{own[name]:{form}}"
    return shown if own == base or not base.get(name) else f"{shown} ({own[name] / base[name]:.2f})"


def part_rows(data: Data) -> list[tuple[str, ...]]:
    """Time per part of a request, one at a time and concurrently."""
    found = []
    for asked, name in (("alone", "one at a time"), ("together", "8 at once")):
        for variant, parts in data["parts"].items():
            own = parts[asked]
            cells = (seconds(own[part]) for part in ("preparing", "encoder", "selection", "decoder", "all"))
            share = "" if variant == UNPRUNED else f"{100 * own['selection'] / own['all']:.1f} %"
            found.append((name, variant, *cells, share))
    return found


def gains(data: Data) -> list[tuple[str, float, float]]:
    """Name, measured and expected gain of each pruned variant.

    Measured: requests per second at the highest load relative to unpruned. Expected: the engine's time per concurrent
    request, unpruned over pruned.
    """
    clients = max(row["concurrency"] for row in data["rows"])
    rates = {
        variant: medians([row for row in data["rows"] if (row["concurrency"], row["variant"]) == (clients, variant)])
        for variant in dict.fromkeys(row["variant"] for row in data["rows"])
    }
    parts = {variant: sum(own["together"][part] for part in _ENGINE) for variant, own in data["parts"].items()}
    return [
        (
            variant,
            rates[variant]["requests_per_second"] / rates[UNPRUNED]["requests_per_second"],
            parts[UNPRUNED] / parts[variant],
        )
        for variant in rates
        if variant != UNPRUNED and variant in parts and UNPRUNED in parts and rates[variant] and rates.get(UNPRUNED)
    ]


_ENGINE = ("encoder", "selection", "decoder")


def markdown(data: Data) -> str:
    """The section of docs/results.md."""
    width, height = data["size"]
    named = f"`{data['model']}`" if data["model"] != "random" else "a random Idefics3 (`benchmarks/serving_model.py`)"
    text = (
        f"`vllm serve` with {named}, a picture of {width} x {height} pixels in each request, answers of "
        f"{data['tokens']} tokens, on {data['device']}. "
        f"{'One server runs at a time' if data.get('alone') else 'Ways take turns'}; medians over "
        f"{1 + max(row['round'] for row in data['rows'])} rounds, in brackets what they are of the unpruned server's. "
        "KV cache: tokens that the blocks in use have room for; a server with shorter prompts works on more requests "
        f"at once, so that under load its peak falls less than a request's share. {versions(data)}"
    )
    parts = (
        "Where the time of a request goes, in the engine itself: preparing images by vLLM's own clock, vision tower "
        "and projector, selection, decoder (the whole prompt and one token), and the total."
    )
    lines = [
        f"* `{variant}` at the highest load: {measured:.2f} times the requests per second; vision, selection and "
        f"decoder of 8 requests at once predict {expected:.2f}, without the server's own time per request."
        for variant, measured, expected in gains(data)
    ]
    return "\n\n".join((text, table(LOAD, load_rows(data)), parts, table(PARTS, part_rows(data)), "\n".join(lines)))


def show(data: Data) -> None:
    """Prints the tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for title, heading, rows in (
        ("under load; in brackets: over unpruned", LOAD, load_rows(data)),
        ("where the time of a request goes", PARTS, part_rows(data)),
    ):
        table = Table(title=title)
        for number, name in enumerate(heading):
            table.add_column(name, justify="left" if number < 2 else "right")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for variant, measured, expected in gains(data):
        console.print(f"{variant}: {measured:.2f} times the requests per second; its parts let expect {expected:.2f}")
