# SPDX-License-Identifier: Apache-2.0
"""Golden check of SCOPE: saliency in both kinds of tower, pick order, scores and coverage."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch

from vtprune.methods.scope import class_saliency, received_saliency
from vtprune.vision.attention import Attention
from vtprune_kernels import facility_location

from .golden_files import cases, close


def check(data: dict[str, np.ndarray]) -> None:
    for group, case in cases(data):
        if group == "salcls":
            check_class_saliency(case)
        elif group == "salqwen":
            check_received_saliency(case)
        else:
            check_selection(case)


def check_selection(case: dict[str, np.ndarray]) -> None:
    features, saliency = torch.from_numpy(case["features"]), torch.from_numpy(case["saliency"])
    crops, length = (len(features), features.shape[1]) if features.dim() == 3 else (1, len(features))
    budget, alpha = int(case["budget"]), float(case["alpha"])
    assert max(1, round(float(case["ratio"]) * length)) == budget
    features, weights = features.reshape(crops * length, -1), saliency.flatten() ** alpha
    offsets, budgets = torch.arange(crops + 1) * length, torch.full((crops,), budget)
    combine: Literal["product", "sum"] = "sum" if case["combine_add"] else "product"
    order = facility_location(features, weights, offsets, budgets, combine=combine) - offsets[:-1, None]
    np.testing.assert_array_equal(order, case["kept_in_order"].reshape(crops, budget))
    np.testing.assert_array_equal(order.sort().values, case["kept"].reshape(crops, budget))
    if alpha == 0:
        assert torch.equal(facility_location(features, None, offsets, budgets), order + offsets[:-1, None])

    unit = torch.nn.functional.normalize(features.reshape(crops, length, -1), dim=-1)
    cosine = unit @ unit.mT
    for crop in range(crops):
        covered, scores = torch.zeros(length), []
        for pick in order[crop].tolist():
            gain = (cosine[crop, pick] - covered).clamp_min(0).sum()
            weight = weights[crop * length + pick]
            scores.append(gain + weight if combine == "sum" else gain * weight)
            covered = torch.maximum(covered, cosine[crop, pick])
        close(torch.stack(scores), case["pick_scores"].reshape(crops, budget)[crop])
        close(covered.sum()[None], case["coverage"][crop : crop + 1])


def check_class_saliency(case: dict[str, np.ndarray]) -> None:
    query, key = (torch.from_numpy(case[name])[None] for name in ("queries", "keys"))
    attention = Attention(query, key, query.shape[-1] ** -0.5, None, None, 1)
    saliency = class_saliency(attention)
    assert saliency[0, 0] == 0
    close(saliency[0, 1:], case["saliency"])
    full = attention.of_class_token()[0, 1:] * query.shape[1]
    close(full, case["saliency_full_softmax"])


def check_received_saliency(case: dict[str, np.ndarray]) -> None:
    query, key = (torch.from_numpy(case[name])[None] for name in ("queries", "keys"))
    offsets = torch.from_numpy(case["lengths"]).cumsum(0)
    block = int(case["merge"]) ** 2
    attention = Attention(query, key, query.shape[-1] ** -0.5, torch.nn.functional.pad(offsets, (1, 0)), None, 0)
    tokens = received_saliency(attention)[0].reshape(-1, block).sum(1)
    close(tokens[torch.from_numpy(case["reverse_indices"])], case["saliency"])
