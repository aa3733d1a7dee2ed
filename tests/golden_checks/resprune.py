# SPDX-License-Identifier: Apache-2.0
"""Golden check of residual selection: pick order, scores, residual energy and automatic budgets."""

from __future__ import annotations

import numpy as np
import torch

from vtprune.core.energy import Auto
from vtprune_kernels import residual_pivots
from vtprune_kernels.residual_pivots import residual_energy

from .golden_files import cases, close


def check(data: dict[str, np.ndarray]) -> None:
    for _, case in cases(data):
        features, budget, picks = torch.from_numpy(case["features"]), int(case["budget"]), int(case["num_by_residual"])
        if case["unit_rows"]:
            features = torch.nn.functional.normalize(features, dim=-1)
        relevance = torch.from_numpy(case["relevance"]) if "relevance" in case else torch.ones(len(features))
        weights, offsets = relevance ** float(case["alpha"]), torch.tensor([0, len(features)])
        if "energy" in case:
            energy, least, most = (float(case[name]) for name in ("energy", "min_share", "max_share"))
            assert Auto(energy, least, most).counts(features, offsets) == [budget]
        else:
            assert max(1, round(float(case["ratio"]) * len(features))) == budget
        order = residual_pivots(features, weights, offsets, torch.tensor([budget]))
        np.testing.assert_array_equal(order[0], case["kept_in_order"])
        np.testing.assert_array_equal(order[0].sort().values, case["kept"])
        close(residual_energy(features, order, offsets)[0, :picks], case["energy_left"])
        rows = features.double()
        for step, pick in enumerate(order[0, :picks].tolist()):
            close((rows[pick].square().sum() * weights[pick])[None].float(), case["pick_scores"][step : step + 1])
            direction = rows[pick] / rows[pick].norm()
            rows = rows - (rows @ direction)[:, None] * direction
