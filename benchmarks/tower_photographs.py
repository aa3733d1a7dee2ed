# SPDX-License-Identifier: Apache-2.0
"""Feature error of cuts inside a real vision tower: writes `benchmarks/results/tower_photographs.json`.

    make real
    .venv-real/bin/python -m benchmarks.tower_photographs

The model of `benchmarks.real.photo_vlm` encodes every photograph of scikit-image with its tower (a DINOv2 of 12 blocks)
cut and uncut. `cosine` is the mean similarity of all patch features (dropped ones as rebuilt by the method) to those of
the uncut tower, `worst` the mean over the tenth of the patches that changed most. Intervals are bootstrapped over the
photographs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vtprune
from benchmarks import command
from benchmarks.mean_rows import mean_rows
from benchmarks.position_bias import photographs
from benchmarks.real import parts, photo_vlm
from vtprune import towers
from vtprune.study import progress

OUT = Path(__file__).resolve().parent / "results" / "tower_photographs.json"
GRID = 24  # patches in each direction
METHODS = ("Change", "Attention", "Similar", "Pixels", "Random", "Uniform")
KEEPS = (0.75, 0.5, 0.35)


@torch.no_grad()
def features(model: Any, pixels: Tensor) -> Tensor:
    """Unit features `[N, D]` of the patches of one photograph."""
    return torch.nn.functional.normalize(model.model.vision_tower(pixels).last_hidden_state[0, 1:], dim=-1)


def compared(model: Any, pixels: Tensor, method: towers.TowerMethod) -> dict[str, float]:
    """Similarity of the cut tower's features to the uncut one's; see the module docstring."""
    whole = features(model, pixels)
    with vtprune.patch(model, tower=method):
        cosine = (features(model, pixels) * whole).sum(-1).sort().values
    return {"cosine": float(cosine.mean()), "worst": float(cosine[: len(cosine) // 10].mean())}


def main() -> None:
    parser = command.parser(__doc__, OUT)
    args = parser.parse_args()
    header = {
        "tower_sha256": parts.SHA256[parts.ONNX],
        "photographs": {one.name: one.license for one in parts.photographs()},
        "grid": GRID,
        "versions": progress.versions(),
    }
    images = [image for _, image in photographs()]
    model = photo_vlm.load(images[:2], GRID)
    cuts = {f"{name} {keep}": getattr(towers, name)(keep=keep) for name in METHODS for keep in KEEPS}

    def run(key: str) -> dict[str, Any]:
        return mean_rows([compared(model, photo_vlm.pixels([image]), cuts[key]) for image in images])

    for key, row in command.fill(args, header, "rows", cuts, run).items():
        print(key, row)


if __name__ == "__main__":
    main()
