# SPDX-License-Identifier: Apache-2.0
"""Golden check of PixelPrune: the cells that stay, from the pixels that a tower is given."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from vtprune.towers import Patches, Pixels
from vtprune.towers.pictures import find_pictures
from vtprune.towers.structure import TowerParts

METRICS = ("max", "mean", "rms")


def patches_of(pixel_values: torch.Tensor, grid: torch.Tensor, merge: int, side: int) -> Patches:
    """What the engine hands a tower method for a packed call."""
    parts = TowerParts(nn.Module(), nn.ModuleList(), SimpleNamespace(), merge, merge, None, (side, side), (), 0, 0)
    given = {"hidden_states": pixel_values, "grid_thw": grid}
    layout = find_pictures(parts, given, (1, len(pixel_values)), None, None, lambda: torch.empty(0), True)
    states = torch.zeros(len(pixel_values), 1)
    nothing: Any = None
    return Patches(
        states,
        before=None,
        offsets=layout.offsets,
        unit=layout.unit,
        unit_offsets=layout.unit_offsets,
        budgets=None,
        grids=layout.grids,
        pixels=layout.pixels,
        received=nothing,
    )


def check(data: dict[str, np.ndarray]) -> None:
    groups = sorted({name.split("_")[0] for name in data})
    assert groups
    for group in groups:
        case = {name.removeprefix(f"{group}_"): value for name, value in data.items() if name.startswith(f"{group}_")}
        merge, tolerance = int(case["merge"]), float(case["threshold"])
        patches = patches_of(
            torch.from_numpy(case["pixel_values"]), torch.from_numpy(case["grid_thw"]), merge, int(case["patch_size"])
        )
        for name, anchored in (("kept", True), ("sliding_kept", False)):
            if name not in case:
                continue
            method = Pixels(tolerance=tolerance, distance=METRICS[int(case["metric"])], anchored=anchored)
            choice = method.choose(patches)
            keep = choice.keep
            cells = keep.reshape(-1, merge * merge)
            assert (cells == cells[:, :1]).all(), "merge groups stay whole"
            np.testing.assert_array_equal(cells[:, 0].nonzero()[:, 0], case[name])
            counts = [int(part[:, 0].sum()) for part in cells.split((patches.unit_offsets.diff()).tolist())]
            np.testing.assert_array_equal(counts, case[f"{name}_counts"])
            if name == "kept":
                np.testing.assert_array_equal(keep.nonzero()[:, 0], case["kept_patches"])
            if tolerance == 0:  # what represents a dropped patch has its pixels
                rebuild, pixels = choice.rebuild, patches.pixels()
                assert torch.equal(pixels[rebuild.dropped], pixels[rebuild.sources[:, 0]])
