# SPDX-License-Identifier: Apache-2.0
"""Golden check of VisPruner: important patches and the diverse rest, in order."""

from __future__ import annotations

import numpy as np
import torch

from vtprune.methods.vispruner import select

from .golden_files import cases, close


def check(data: dict[str, np.ndarray]) -> None:
    for _, case in cases(data):
        scores = torch.from_numpy(case["cls_attention"]).mean(0)
        close(scores, case["scores"])
        budget = int(case["budget"])
        important = int(budget * float(case["important_ratio"]))
        assert important == int(case["important_num"])
        first, second = select(torch.from_numpy(case["features"]), torch.from_numpy(case["scores"]), budget, important)
        np.testing.assert_array_equal(first, case["important_in_order"])
        np.testing.assert_array_equal(second, case["diverse_in_order"])
        np.testing.assert_array_equal(torch.cat([first, second]).sort().values, case["kept"])
