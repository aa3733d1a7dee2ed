# SPDX-License-Identifier: Apache-2.0
"""Golden check of VisPruner: important patches and the diverse rest, in order."""

from __future__ import annotations

import numpy as np
import torch

from vtprune.methods.vispruner import select


def check(data: dict[str, np.ndarray]) -> None:
    groups = sorted({name.split("_")[0] for name in data})
    assert groups
    for group in groups:
        case = {name.removeprefix(f"{group}_"): value for name, value in data.items() if name.startswith(f"{group}_")}
        scores = torch.from_numpy(case["cls_attention"]).mean(0)
        np.testing.assert_allclose(scores, case["scores"], rtol=1e-4, atol=1e-6 * np.abs(case["scores"]).max())
        budget = int(case["budget"])
        important = int(budget * float(case["important_ratio"]))
        assert important == int(case["important_num"])
        first, second = select(torch.from_numpy(case["features"]), torch.from_numpy(case["scores"]), budget, important)
        np.testing.assert_array_equal(first, case["important_in_order"])
        np.testing.assert_array_equal(second, case["diverse_in_order"])
        np.testing.assert_array_equal(torch.cat([first, second]).sort().values, case["kept"])
