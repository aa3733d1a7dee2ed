# SPDX-License-Identifier: Apache-2.0
"""Compares every method with the default at equal mean cost, over all test beds in `benchmarks/results`.

    python -m benchmarks.equal_cost        # one line per comparison; exit code 1 if a method is clearly better

Test beds are the texts of `benchmarks.needle` on a real decoder and the scenes of `benchmarks.accuracy` on the built-in
models. Rows are compared if their shares of visual tokens, averaged over the inputs of the decoder layers, differ by
at most 3 % (relative). A method is clearly better if the 95 % interval of its lead lies above 0: paired by question, or
for two proportions (Newcombe) if only counts are known. For equally good methods this happens in one of 40 comparisons.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vtprune.core.default_method import NAME
from vtprune.study.intervals import bootstrap, wilson

RESULTS = Path(__file__).resolve().parent / "results"
TOLERANCE = 0.03


@dataclass(frozen=True)
class Comparison:
    """Comparison of a method with the default.

    Attributes:
        bed, cost, method: Test bed, mean share of visual tokens, and method.
        share, default: Shares of right answers, on the same texts if outcomes are paired.
        total: Number of questions.
        low, high: The 95 % interval of the method's lead.
    """

    bed: str
    cost: float
    method: str
    share: float
    default: float
    total: int
    low: float
    high: float


def lead(row: dict[str, Any], default: dict[str, Any]) -> tuple[float, float, int, float, float]:
    """Both shares of right answers, number of questions, and the interval of the difference."""
    answers = [one.get("outcomes", one.get("answers")) for one in (row, default)]  # keys of needle and accuracy rows
    if None not in answers:
        pairs = list(zip(*(map(int, given) for given in answers), strict=False))  # up to the shorter one
        mine, theirs = (sum(values) / len(pairs) for values in zip(*pairs, strict=True))
        return mine, theirs, len(pairs), *bootstrap([a - b for a, b in pairs])
    mine, theirs = (one["right"] / one["total"] for one in (row, default))
    (low, high), (other_low, other_high) = (wilson(one["right"], one["total"]) for one in (row, default))
    below, above = math.hypot(mine - low, other_high - theirs), math.hypot(high - mine, theirs - other_low)
    return mine, theirs, row["total"], mine - theirs - below, mine - theirs + above


def beds(results: Path = RESULTS) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Name and rows of every test bed; rows have `method`, `cost` and right answers."""
    needle = results / "needle.json"
    data = json.loads(needle.read_text(encoding="utf-8")) if needle.exists() else {}
    for places in sorted((name for name in data if name.isdigit()), key=int):
        rows = [row | {"cost": row["mean_ratio"]} for row in data[places].values() if "mean_ratio" in row]
        yield f"texts of {int(places):,} places, real decoder", [row for row in rows if "outcomes" in row]
    for path in sorted(results.glob("accuracy*.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        rows = [row for row in data["rows"] if "refused" not in row and row["method"] not in ("oracle", "resize")]
        whole = data["unpruned"]["visual_tokens"]
        part = " beside resizing" if path.stem.endswith("resize") else ""
        yield f"scenes, built-in {data['model']}{part}", [row | {"cost": row["mean_tokens"] / whole} for row in rows]


def comparisons(results: Path = RESULTS) -> list[Comparison]:
    """Comparisons of every method at every cost at which the default was measured."""
    found = []
    for bed, rows in beds(results):
        defaults = {round(row["cost"], 3): row for row in rows if row["method"] == NAME}  # one per cost
        for cost, default in sorted(defaults.items(), reverse=True):
            others = {
                row["method"]: row
                for row in rows
                if row["method"] != NAME and abs(row["cost"] - cost) <= TOLERANCE * cost
            }
            found += [Comparison(bed, cost, name, *lead(row, default)) for name, row in sorted(others.items())]
    return found


def better(found: list[Comparison]) -> list[Comparison]:
    """The comparisons in which the method is clearly better than the default."""
    return [one for one in found if one.low > 0]


def main() -> int:
    found = comparisons()
    for one in found:
        verdict = "BETTER" if one.low > 0 else "worse" if one.high < 0 else ""
        print(
            f"{one.bed:36} {one.cost:.2f} {one.method:12} {one.share:6.1%} of {one.total}, {NAME} {one.default:6.1%}, "
            f"lead {one.low:+.1%} to {one.high:+.1%} {verdict}"
        )
    print(f"{len(found)} comparisons, {len(better(found))} in which a method is clearly better than {NAME}")
    return int(bool(better(found)))


if __name__ == "__main__":
    sys.exit(main())
