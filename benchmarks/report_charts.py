# SPDX-License-Identifier: Apache-2.0
"""Charts of results."""

from __future__ import annotations

from typing import Any

from vtprune.study.charts import Chart, Series
from vtprune.study.fidelity_view import chart as fidelity

__all__ = ["accuracy", "fidelity"]


def accuracy(data: dict[str, Any]) -> Chart:
    """Right answers against the mean cost, a line per method."""
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
