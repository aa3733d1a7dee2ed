# SPDX-License-Identifier: Apache-2.0
"""Position bias of methods on photographs: writes `benchmarks/results/position-bias.json`.

    make real
    .venv-real/bin/python -m benchmarks.position_bias

The model of `benchmarks.real.photo_vlm` gets every photograph of scikit-image upright and rotated by 180 degrees. A
method that selects by content keeps the same patches of both; one that selects by position keeps the same positions.
For each method:

* `content`: share of the patches kept in the rotated picture that are also kept in the upright one;
* `place`: share of the positions kept in the rotated picture that are also kept in the upright one;
* `row_upright`, `row_turned`: mean row of the kept tokens, 0 at the top and 1 at the bottom; 0.5 without bias;
* `bias`: the mean of the two rows minus 0.5, in which the contribution of the content cancels.

By chance both shares are the ratio. Intervals are bootstrapped over the photographs.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import vtprune
from benchmarks import command
from benchmarks.mean_rows import mean_rows
from benchmarks.real import parts, photo_vlm
from vtprune.study import progress

OUT = Path(__file__).resolve().parent / "results" / "position-bias.json"
GRID = 24  # 576 visual tokens
RATIO = 0.25
QUESTION = "What is in the picture?"


@lru_cache(maxsize=1)
def photographs() -> list[tuple[str, Image.Image]]:
    """Name and center crop of every photograph."""
    return [(one.name, photo_vlm.square(one.image, GRID)) for one in parts.photographs()]


@lru_cache(maxsize=1)
def model() -> Any:
    """The model of real parts with its projector fitted on all photographs, upright and rotated."""
    images = [image for _, image in photographs()]
    return photo_vlm.load([*images, *(image.rotate(180) for image in images)], GRID)


@torch.no_grad()
def kept(method: str, image: Image.Image, ratio: float) -> tuple[np.ndarray, np.ndarray]:
    """Masks of the kept visual tokens of a photograph and of its rotation, bool `[GRID * GRID]` each."""
    inputs = photo_vlm.inputs([image, image.rotate(180)], GRID, QUESTION)
    with vtprune.patch(model(), ratio=ratio, method=method) as patch:
        model()(**inputs, use_cache=False, logits_to_keep=1)
        last = patch.last
    upright, turned = (torch.isin(v, k).numpy() for v, k in zip(last.visual, last.kept, strict=True))
    return upright, turned


def compared(upright: np.ndarray, turned: np.ndarray) -> dict[str, float]:
    """Overlap of two selections; see the module docstring."""
    rows = np.arange(GRID * GRID) // GRID / (GRID - 1)
    top, bottom = rows[upright].mean(), rows[turned].mean()
    return {
        "content": float((turned & upright[::-1]).sum() / turned.sum()),
        "place": float((turned & upright).sum() / turned.sum()),
        "row_upright": float(top),
        "row_turned": float(bottom),
        "bias": float((top + bottom) / 2 - 0.5),
    }


def run(method: str, ratio: float) -> dict[str, Any]:
    """The row of a method: means over photographs with intervals, or the reason of its refusal."""
    try:
        found = [compared(*kept(method, image, ratio)) for _, image in photographs()]
    except (vtprune.MethodError, vtprune.BudgetError) as error:
        return {"refused": str(error)}
    return mean_rows(found)


def main(argv: list[str] | None = None) -> None:
    parser = command.parser(__doc__, OUT)
    parser.add_argument("--methods", nargs="+", default=command.METHODS)
    parser.add_argument("--ratio", type=float, default=RATIO)
    args = parser.parse_args(argv)
    header = {
        "decoder_sha256": parts.SHA256[parts.GGUF],
        "tower_sha256": parts.SHA256[parts.ONNX],
        "photographs": {one.name: one.license for one in parts.photographs()},
        "grid": GRID,
        "ratio": args.ratio,
        "versions": progress.versions(),
    }
    rows = command.fill(args, header, "methods", args.methods, lambda name: run(name, args.ratio))
    for name, row in rows.items():
        if "refused" in row:
            print(f"{name:12} refused: {row['refused'][:90]}")
        else:
            shown = "  ".join(f"{key} {value['mean']:.2f} {value['interval']}" for key, value in row.items())
            print(f"{name:12} {shown}")


if __name__ == "__main__":
    main()
