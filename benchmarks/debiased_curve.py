# SPDX-License-Identifier: Apache-2.0
"""Effect of `Debiased` on FastV's position bias: writes `benchmarks/results/debiased_curve.json`.

    make real
    .venv-real/bin/python -m benchmarks.debiased_curve

Photographs and model are those of `benchmarks.position_bias`. FastV's scores are ranked unchanged, with the released
curve (fitted to another model), and with curves fitted to the other half of the photographs; "divided by the mean of
each place" is the upper bound for any curve over positions.

** `last_quarter`: share of the kept tokens in the last quarter of the rows, 0.25 without bias;
* `curve`: ratio of the curve's values at the last and the first position;
* `between`: share of the variance of log scores that is between rows;
* `heaviest`: share of the total score in the tenth of the tokens with the largest scores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import command
from benchmarks.mean_rows import mean_row
from benchmarks.position_bias import GRID, QUESTION, RATIO, model, photographs
from benchmarks.real import parts, photo_vlm
from vtprune.methods import FastV
from vtprune.methods.debiased.position_curve import Curve
from vtprune.study import progress
from vtprune.study.calibration import collect

OUT = Path(__file__).resolve().parent / "results" / "debiased_curve.json"


def scores() -> list[Tensor]:
    """FastV's scores `[N]` of every photograph, upright and turned."""
    batches = [photo_vlm.inputs([image, image.rotate(180)], GRID, QUESTION) for _, image in photographs()]
    return collect(FastV(), None, model(), batches)[0]


def last_quarter(score: Tensor) -> float:
    """Share of the kept tokens in the last quarter of the rows."""
    kept = score.topk(round(RATIO * len(score))).indices
    return float((kept >= len(score) * 3 // 4).float().mean())


def row(found: Sequence[float], curves: Sequence[Curve]) -> dict[str, Any]:
    """Row of one ranking: mean over pictures, and the ratio of the ends of its curves."""
    ends = [float(curve(torch.zeros(1)) / curve(torch.ones(1))) for curve in curves]
    mean = mean_row(found)
    return {
        "last_quarter": mean["mean"],
        "interval": mean["interval"],
        "curve": [round(end, 2) for end in ends],
    }


def measure() -> dict[str, Any]:
    """All rows, and statistics of the uncorrected scores."""
    found = scores()
    place = torch.linspace(0, 1, GRID * GRID)
    halves = (found[: len(found) // 2], found[len(found) // 2 :])
    rows = {"as they are": row([last_quarter(one) for one in found], [])}
    released = Curve.preset("fastv")
    rows["released curve"] = row([last_quarter(one * released(place)) for one in found], [released])
    for form in ("exponential", "log-linear", "reciprocal-cubic"):
        try:
            curves = [Curve.fit(half, form=form) for half in halves[::-1]]
        except ValueError as error:
            rows[f"fitted, {form}"] = {"refused": str(error)}
            continue
        shares = [last_quarter(one * c(place)) for half, c in zip(halves, curves, strict=True) for one in half]
        rows[f"fitted, {form}"] = row(shares, curves)
    means = [
        torch.stack(list(half)).div(torch.stack(list(half)).mean(1, keepdim=True)).mean(0) for half in halves[::-1]
    ]
    shares = [last_quarter(one / m) for half, m in zip(halves, means, strict=True) for one in half]
    rows["divided by the mean of each place"] = row(shares, [])
    logs = [one.log().view(GRID, GRID) for one in found]
    between = [float(one.mean(1).var(correction=0) / one.var(correction=0)) for one in logs]
    heaviest = [float(one.topk(len(one) // 10).values.sum() / one.sum()) for one in found]
    profile = torch.stack([one.view(GRID, GRID).sum(1) / one.sum() for one in found]).mean(0)
    return {
        "rows": rows,
        "between": round(math.fsum(between) / len(between), 3),
        "heaviest": round(math.fsum(heaviest) / len(heaviest), 3),
        "by_row": [round(float(share), 4) for share in profile],
    }


def main(argv: list[str] | None = None) -> None:
    parser = command.parser(__doc__, OUT, resumes=False)
    args = parser.parse_args(argv)
    header = {
        "decoder_sha256": parts.SHA256[parts.GGUF],
        "tower_sha256": parts.SHA256[parts.ONNX],
        "photographs": len(photographs()),
        "grid": GRID,
        "ratio": RATIO,
        "versions": progress.versions(),
    }
    data = header | measure()
    progress.save(args.out, data)
    for name, found in data["rows"].items():
        print(f"{name:36} {found}")
    print("between rows", data["between"], "heaviest tenth", data["heaviest"])


if __name__ == "__main__":
    main()
