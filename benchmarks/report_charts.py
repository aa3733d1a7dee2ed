# SPDX-License-Identifier: Apache-2.0
"""Charts of results."""

from __future__ import annotations

from typing import Any

from vtprune.study.charts import Chart, Series
from vtprune.study.fidelity_view import chart as fidelity

__all__ = ["accuracy", "fidelity"]


def accuracy(data: dict[str, Any]) -> Chart:
    """Right answers against the share of visual tokens kept, a line per method."""
    rows = [row for row in data["rows"] if "ratio" in row and "refused" not in row]
    series = []
    for method in sorted({row["method"] for row in rows}):
        mine = sorted((row for row in rows if row["method"] == method), key=lambda row: row["ratio"])
        low, high = ([100 * row["interval"][end] for row in mine] for end in (0, 1))
        right = [100 * row["right"] / row["total"] for row in mine]
        series.append(Series(method, [row["ratio"] for row in mine], right, low, high))
    base = data["unpruned"]
    return Chart(
        title=data["questions"],
        x_label="share of visual tokens kept to the last layer",
        y_label="right answers, %",
        series=series,
        log_x=True,
        mark=("unpruned", None, 100 * base["right"] / base["total"]),
    )
