# SPDX-License-Identifier: Apache-2.0
"""Golden check of DivPrune: the pick order and the distance of each pick."""

from __future__ import annotations

import numpy as np
import torch

from vtprune_kernels import weighted_farthest_point

from .golden_files import cases, close


def check(data: dict[str, np.ndarray]) -> None:
    for _, case in cases(data):
        features, budget = torch.from_numpy(case["features"]), int(case["budget"])
        assert round(float(case["ratio"]) * len(features)) == budget
        order = weighted_farthest_point(features, None, torch.tensor([0, len(features)]), torch.tensor([budget]))[0]
        np.testing.assert_array_equal(order, case["kept_in_order"])
        np.testing.assert_array_equal(order.sort().values, case["kept"])
        distance = 1 - torch.cosine_similarity(features[order][:, None], features[None], dim=-1)  # [K, N]
        to_others = distance[0].clone()
        to_others[order[0]] = torch.inf
        later = [distance[:i, row].min() for i, row in enumerate(order.tolist()) if i]
        close(torch.stack([to_others.min(), *later]), case["pick_scores"])
