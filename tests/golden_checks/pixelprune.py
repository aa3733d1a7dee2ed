# SPDX-License-Identifier: Apache-2.0
"""Golden check of PixelPrune: kept cells from the pixels of a tower call; as tokens they rank first."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from vtprune import methods
from vtprune.core.ragged import top_k
from vtprune.towers import Patches, Pixels
from vtprune.vision.patch_sizes import PatchSizes
from vtprune.vision.pictures import Layout, find_pictures

from .golden_files import cases

METRICS = ("max", "mean", "rms")


def layout_of(pixel_values: torch.Tensor, grid: torch.Tensor, merge: int, side: int) -> Layout:
    """The layout of the pictures of a packed call."""
    parts = PatchSizes(nn.Module(), SimpleNamespace(), merge, merge, None, (side, side), False)
    given = {"hidden_states": pixel_values, "grid_thw": grid}
    return find_pictures(parts, given, (1, len(pixel_values)), None, None, lambda: torch.empty(0), True)


def patches_of(layout: Layout) -> Patches:
    """The `Patches` that the engine passes to a tower method."""
    states = torch.zeros(layout.length, 1)
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
    for _, case in cases(data):
        merge, tolerance = int(case["merge"]), float(case["threshold"])
        layout = layout_of(
            torch.from_numpy(case["pixel_values"]), torch.from_numpy(case["grid_thw"]), merge, int(case["patch_size"])
        )
        patches = patches_of(layout)
        for name, anchored in (("kept", True), ("sliding_kept", False)):
            if name not in case:
                continue
            options = {"tolerance": tolerance, "distance": METRICS[int(case["metric"])], "anchored": anchored}
            choice = Pixels(**options).choose(patches)
            keep = choice.keep
            cells = keep.reshape(-1, merge * merge)
            assert (cells == cells[:, :1]).all(), "a merge group was split"
            np.testing.assert_array_equal(cells[:, 0].nonzero()[:, 0], case[name])
            counts = [int(part[:, 0].sum()) for part in cells.split((patches.unit_offsets.diff()).tolist())]
            np.testing.assert_array_equal(counts, case[f"{name}_counts"])
            scores = methods.Pixels(**options).distances(layout)
            first = top_k(scores, patches.unit_offsets, torch.from_numpy(case[f"{name}_counts"]))
            np.testing.assert_array_equal(first.nonzero()[:, 0], case[name])
            if name == "kept":
                np.testing.assert_array_equal(keep.nonzero()[:, 0], case["kept_patches"])
            if tolerance == 0:  # the source of a dropped patch has the same pixels
                rebuild, pixels = choice.rebuild, patches.pixels()
                assert torch.equal(pixels[rebuild.dropped], pixels[rebuild.sources[:, 0]])
