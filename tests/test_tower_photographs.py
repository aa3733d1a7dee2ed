# SPDX-License-Identifier: Apache-2.0
"""The benchmark of cuts in a real tower, run on the tower of the built-in model."""

from __future__ import annotations

import pytest
import torch

from benchmarks import report_real, tower_photographs
from vtprune import refvlm, towers


def test_features_of_a_cut_tower_beside_the_uncut_one() -> None:
    model, processor = refvlm.load()
    pixels = processor(images=refvlm.scenes.scene(3).image, text=refvlm.prompt("what?"), return_tensors="pt")[
        "pixel_values"
    ]
    whole = tower_photographs.compared(model, pixels, towers.Random(keep=1.0, block=1))
    assert whole == pytest.approx({"cosine": 1.0, "worst": 1.0}, abs=1e-5)
    cut = tower_photographs.compared(model, pixels, towers.Random(keep=0.5, block=1))
    assert 0 < cut["worst"] < cut["cosine"] < 0.999
    rows = {"Random 0.5": {key: {"mean": value, "interval": [0.1, 0.9]} for key, value in cut.items()}}
    text = report_real.tower_photographs({"photographs": {}, "grid": 24, "versions": {}, "rows": rows})
    assert f"| `Random 0.5` | {cut['cosine']:.2f} (0.10" in text
    assert torch.is_grad_enabled()
