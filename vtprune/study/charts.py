# SPDX-License-Identifier: Apache-2.0
"""Line charts of results, drawn with matplotlib; the same data always gives the same file."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from ..core.files import write_bytes
from ..errors import InputError, VTPruneError

# Distinguishable colors, then markers: enough combinations for every registered method.
_COLORS = ("#1b6ca8", "#d1495b", "#2a9d4e", "#e08e0b", "#7b4fa3", "#00838f", "#8d6e63", "#555555")
_MARKERS = "osD^vP"
_APART = 1.15  # least ratio of two labeled places on a logarithmic axis
_DRAWING = 2  # version of the drawing code: raise it when charts are to be drawn again
_STYLE = {
    "svg.hashsalt": "vtprune",
    "svg.fonttype": "none",  # keep text as text, which makes smaller files
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        label: Name in the legend.
        x, y: Points, in drawing order.
        low, high: Ends of the error bars of `y`, or None.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


@dataclass(frozen=True)
class Chart:
    """Content of a line chart.

    Attributes:
        title, x_label, y_label: Text.
        series: Lines.
        frontier: Points of a broad gray line behind the others, by ascending `x`.
        log_x, log_y: Use logarithmic axes; zeros are left out there.
        mark: Reference point (the unpruned model): `(label, x, y)`, drawn as dotted lines; either may be None.
    """

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    frontier: Sequence[tuple[float, float]] = ()
    log_x: bool = False
    log_y: bool = False
    mark: tuple[str, float | None, float | None] | None = None


def digest(charts: Sequence[Chart]) -> str:
    """SHA-256 of the content of charts; stored in a file's metadata, it shows whether the file is up to date."""
    shown = json.dumps([_DRAWING, *map(dataclasses.asdict, charts)], sort_keys=True)
    return hashlib.sha256(shown.encode()).hexdigest()


def available() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def check(path: str | Path) -> None:
    """Checks before long work that a chart can be drawn.

    Raises:
        InputError: The ending of the file's name is not that of a chart.
        VTPruneError: matplotlib is not installed.
    """
    if Path(path).suffix.lower() not in (".svg", ".png", ".pdf"):
        raise InputError(f"cannot draw a chart in {path}; expected a file name that ends in .svg, .png or .pdf")
    if not available():
        raise VTPruneError("a chart needs matplotlib, which is not installed: pip install matplotlib")


def save(charts: Sequence[Chart], path: str | Path) -> None:
    """Draws charts of the same series below each other, with one legend.

    Args:
        charts: One or several.
        path: File to write; its ending (.svg, .png, .pdf) selects the format. An SVG has `digest` in its metadata.

    Raises:
        VTPruneError: matplotlib is not installed.
        InputError, OSError: The file cannot be written, or its format is unknown.
    """
    check(path)
    # Imported by name, because type checkers run without matplotlib, which is optional.
    matplotlib: Any = importlib.import_module("matplotlib")
    figures: Any = importlib.import_module("matplotlib.figure")
    with matplotlib.rc_context(_STYLE):
        figure = figures.Figure(figsize=(7.5, 4.2 * len(charts)), layout="constrained")
        for index, chart in enumerate(charts):
            _draw(figure.add_subplot(len(charts), 1, index + 1), chart)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper")
        write_figure(figure, path, {"Date": None, "Creator": None, "Description": f"sha256 {digest(charts)}"})


def write_figure(figure: Any, path: str | Path, about: dict[str, str | None]) -> None:
    """Writes a matplotlib figure in the format that the file's ending selects; an SVG with `about` as its metadata."""
    kind = Path(path).suffix.lower().removeprefix(".")
    buffer = BytesIO()
    figure.savefig(buffer, format=kind, metadata=about if kind == "svg" else None, dpi=150)
    write_bytes(path, buffer.getvalue())


def _draw(axes: Any, chart: Chart) -> None:
    if chart.log_x:
        axes.set_xscale("log")
        ticks: list[float] = []
        for tick in sorted({x for series in chart.series for x in series.x}, reverse=True):
            if not ticks or tick < ticks[-1] / _APART:  # so that labels do not lie over each other
                ticks.append(tick)
        axes.set_xticks(ticks, [f"{tick:.2g}" for tick in ticks])
        axes.set_xticks([], minor=True)
    if chart.log_y:
        axes.set_yscale("log")
    if chart.mark is not None:
        label, x, y = chart.mark
        if x is not None:
            axes.axvline(x, color="black", linestyle=":", linewidth=1, label=label)
        if y is not None:
            axes.axhline(y, color="black", linestyle=":", linewidth=1, label=label if x is None else None)
    if chart.frontier:
        axes.plot(*zip(*chart.frontier, strict=True), color="#cccccc", linewidth=6, zorder=0, label="frontier")
    for number, series in enumerate(chart.series):
        _line(axes, series, number, chart.log_y)
    axes.set_xlabel(chart.x_label)
    axes.set_ylabel(chart.y_label)
    title = chart.title.encode(errors="replace").decode()  # names of files may hold bytes that are no text
    axes.set_title(title, loc="left")
    axes.grid(alpha=0.25, linewidth=0.5)


def _line(axes: Any, series: Series, number: int, log_y: bool) -> None:
    shown = [i for i, y in enumerate(series.y) if y > 0 or not log_y]
    x, y = [series.x[i] for i in shown], [series.y[i] for i in shown]
    bars = None
    if series.low is not None and series.high is not None:
        # On a logarithmic axis, matplotlib draws a bar that ends at 0 down to the edge.
        bars = [
            [max(0.0, series.y[i] - series.low[i]) for i in shown],
            [max(0.0, series.high[i] - series.y[i]) for i in shown],
        ]
    marker = _MARKERS[number // len(_COLORS) % len(_MARKERS)]
    axes.errorbar(
        x,
        y,
        yerr=bars,
        label=series.label,
        color=_COLORS[number % len(_COLORS)],
        marker=marker,
        markersize=4,
        linewidth=1,
        elinewidth=0.5,
    )
