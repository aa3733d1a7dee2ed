# SPDX-License-Identifier: Apache-2.0
"""Charts of results."""

from __future__ import annotations

from typing import Any

from vtprune.study.charts import Chart, Series
from vtprune.study.fidelity_view import chart as fidelity

__all__ = ["accuracy", "fidelity", "first_token"]


def accuracy(data: dict[str, Any]) -> Chart:
    """Right answers against mean cost, one line per method."""
    whole = data["unpruned"]["visual_tokens"]
    rows = [row | {"cost": row["mean_tokens"] / whole} for row in data["rows"] if "refused" not in row]
    series = []
    for method in sorted({row["method"] for row in rows}):
        mine = sorted((row for row in rows if row["method"] == method), key=lambda row: row["cost"])
        low, high = ([100 * row["interval"][end] for row in mine] for end in (0, 1))
        right = [100 * row["right"] / row["total"] for row in mine]
        series.append(Series(method, [row["cost"] for row in mine], right, low, high))
    base = data["unpruned"]
    return Chart(
        title=data["questions"],
        x_label="mean cost: share of visual tokens over the inputs of decoder layers",
        y_label="right answers, %",
        series=series,
        log_x=True,
        mark=("unpruned", None, 100 * base["right"] / base["total"]),
    )


def first_token(data: dict[str, Any]) -> Chart:
    """KL divergence against time to the first token: resizing, decoder methods, tower methods, and both."""
    (name, part), *_ = data["parts"].items()
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in part["rows"]:
        label = row["row"].split()[0]
        if "," in row["row"]:  # NAME KEEP, decoder RATIO
            label = f"tower {row['row'].split(',')[0]} + decoder"
        elif label[0].isupper():
            label = f"tower {label}"
        lines.setdefault(label, []).append(row)
    lines.pop("unpruned")
    return Chart(
        title=f"Built-in {data['model']}, {part['prompts']} prompts: {name} pixels",
        x_label="processor time to the first token, vision tower and selection included; unpruned = 1",
        y_label="KL of the next token, nats",
        series=[
            Series(
                label,
                [row["time"] for row in rows],
                [row["kl"] for row in rows],
                *([row["kl_interval"][end] for row in rows] for end in (0, 1)),
            )
            for label, rows in lines.items()
        ],
        log_y=True,
        mark=("unpruned", 1.0, None),
    )
