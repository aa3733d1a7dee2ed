# SPDX-License-Identifier: Apache-2.0
"""Golden check of ZOO-Prune: directions, sensitivity by finite differences and by derivatives, selection per crop."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn.functional import gelu, linear

from vtprune.methods.zoo_prune.method import select
from vtprune.methods.zoo_prune.sensitivity import difference_sensitivity, jvp_sensitivity, unit_directions

from .golden_files import cases


def check(data: dict[str, np.ndarray]) -> None:
    for _, case in cases(data):
        t = {name: torch.from_numpy(np.asarray(value)) for name, value in case.items()}
        if "frame_label" in case:
            check_crops(case, t)
            continue
        assert int(float(case["ratio"]) * len(t["features"])) == int(case["budget"])
        u = unit_directions(t["directions_raw"])
        np.testing.assert_allclose(u, case["directions"], rtol=1e-5, atol=1e-7)

        def project(x: torch.Tensor, t: dict[str, torch.Tensor] = t) -> torch.Tensor:
            w = {name: t[f"proj_{name}"].to(x.dtype) for name in ("w1", "b1", "w2", "b2")}
            return linear(gelu(linear(x, w["w1"], w["b1"])), w["w2"], w["b2"])

        np.testing.assert_allclose(project(t["features"]), case["projected_features"], rtol=1e-4, atol=1e-5)
        h = float(case["h"])
        found = difference_sensitivity(project, t["features"], u, h)
        np.testing.assert_allclose(found, case["sensitivity"], rtol=1e-4)
        limit = max(1e-5, h**2 / 10)  # differences are the derivative up to the square of the step
        np.testing.assert_allclose(jvp_sensitivity(project, t["features"], u), case["sensitivity_fp64"], rtol=limit)
        exact = difference_sensitivity(project, t["features"].double(), u.double(), h)
        np.testing.assert_allclose(exact, case["sensitivity_fp64"], rtol=1e-5)
        offsets = torch.tensor([0, len(t["features"])])
        order = select(t["projected_features"], t["sensitivity"], offsets, t["budget"][None])[0]
        np.testing.assert_array_equal(order, case["kept_in_order"])
        np.testing.assert_array_equal(order.sort().values, case["kept"])


def check_crops(case: dict[str, np.ndarray], t: dict[str, torch.Tensor]) -> None:
    label = t["frame_label"]
    crops = label[label >= 0].unique()
    rows = torch.cat([(label == crop).nonzero()[:, 0] for crop in crops])
    sizes = torch.stack([(label == crop).sum() for crop in crops])
    offsets = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    budgets = t["budget_per_frame"].expand(len(crops))
    order = rows[select(t["projected_features"][rows], t["sensitivity"][rows], offsets, budgets).flatten()]
    np.testing.assert_array_equal(order, case["kept_in_order"])
    np.testing.assert_array_equal(order.sort().values, case["kept"])
