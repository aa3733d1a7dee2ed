# SPDX-License-Identifier: Apache-2.0
"""Chart of a benchmark: the time of each variant by part, beside the limit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import VTPruneError
from ..study import charts
from . import summary

_PARTS = (
    ("vision", "#b8c4ce"),
    ("selection", "#d1495b"),
    ("rest of the prefill", "#1b6ca8"),
    ("further tokens and the rest", "#8fbcd4"),
)


def save(data: Mapping[str, Any], path: str | Path, cpu: bool = False) -> None:
    """Draws a bar of parts for every variant in every setting, and the limits as dashed lines.

    Args:
        data: Return value of `vtprune.bench.measure.run`.
        path: File to write; its ending (.svg, .png, .pdf) selects the format. The same data gives the same file.
        cpu: Use CPU time of the process instead of wall-clock time.
    """
    charts.check(path)
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "vtprune", "svg.fonttype": "none", "font.size": 9}):
        from matplotlib.figure import Figure

        groups = _groups(data, cpu)
        heights = [1.1 + 0.24 * len(rows) for _, rows in groups]
        figure = Figure(figsize=(8, sum(heights) + 0.5), layout="constrained")
        axes = figure.subplots(len(groups), 1, squeeze=False, height_ratios=heights)[:, 0]
        for ax, (name, rows) in zip(axes, groups, strict=True):
            _bars(ax, rows)
            ax.set_title(f"{data['model']}, {name} ({data['dtype']}, {data['device']})", loc="left")
        clock = "of CPU time " if cpu else ""
        axes[-1].set_xlabel(f"milliseconds {clock}to the end of the answer (medians)")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
        charts.write_figure(figure, path, {"Date": None})


def _groups(data: Mapping[str, Any], cpu: bool) -> list[tuple[str, list[dict[str, Any]]]]:
    found = {name: summary.rows_of(setting, data["variants"], cpu) for name, setting in data["settings"].items()}
    ran = {name: [row for row in rows if "refused" not in row] for name, rows in found.items()}
    groups = [(name, rows) for name, rows in ran.items() if rows]
    if not groups:
        raise VTPruneError("the result has no successful run to draw; see its refusals")
    return groups


def _bars(ax: Any, rows: list[dict[str, Any]]) -> None:
    vision = next((row["vision"]["median"] for row in rows if row["variant"] == "unpruned"), 0.0)
    starts = [0.0] * len(rows)
    lengths = []
    for row in rows:
        seen = vision if row["variant"].startswith("limit ") else row["vision"]["median"]
        selection, prefill = row["decision"]["median"], row["prefill"]["median"]
        lengths.append((seen, selection, prefill - selection, row["end_to_end"]["median"] - seen - prefill))
    for part, (label, color) in enumerate(_PARTS):
        widths = [1e3 * max(0.0, length[part]) for length in lengths]
        ax.barh(range(len(rows)), widths, left=starts, color=color, label=label, height=0.7)
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    ends = [1e3 * row["end_to_end"]["median"] for row in rows if row["variant"].startswith("limit ")]
    for number, end in enumerate(ends):
        ax.axvline(end, color="#333333", linestyle="--", linewidth=0.8, label=None if number else "limit")
    ax.set_yticks(range(len(rows)), [row["variant"] for row in rows])
    ax.invert_yaxis()
    ax.spines[["top", "right"]].set_visible(False)
