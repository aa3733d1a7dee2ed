# SPDX-License-Identifier: Apache-2.0
"""Golden check of attention debiasing: padding masks, curves, weighted scores and kept tokens, for three hosts."""

from __future__ import annotations

import numpy as np
import torch

from vtprune.core.ragged import rank_in_group, top_k
from vtprune.methods.debiased.padding import PaddingRule
from vtprune.methods.debiased.position_curve import Curve

from .golden_files import cases, close

RULES = {
    "fastv": PaddingRule("area", 0.5),
    "fastvbefore": PaddingRule("integer"),
    "pyramiddrop": PaddingRule("area", 0.01),
    "sparsevlm": PaddingRule("bilinear"),
}


def check(data: dict[str, np.ndarray]) -> None:
    for group, case in cases(data):
        rule = RULES[max((host for host in RULES if group.startswith(host)), key=len)]
        width, height = case["image_size"].tolist()
        mask = rule.grid(height, width, len(case["pad_mask"]))
        np.testing.assert_array_equal(mask.long().numpy(), case["pad_mask"])

        attention = torch.from_numpy(case["attention"])
        weights = torch.ones(len(attention))
        if "curve" in case:
            curve = Curve.preset("fastv") if "sigma" not in case else Curve("exponential", (float(case["sigma"]),))
            weights = curve(torch.arange(len(attention)) / (len(attention) - 1))
            close(weights, case["curve"])
        scores = attention * weights * mask.flatten()
        close(scores, case["scores"])

        budget = int(case["budget"])
        if "budget_requested" in case:  # the released code lowers the rank to the number of unpadded tokens
            assert budget == min(int(case["budget_requested"]), int(mask.sum()))
        pool = torch.tensor([0, len(scores)])
        kept = top_k(scores, pool, torch.tensor([budget])).nonzero().flatten()
        assert kept.tolist() == case["kept"].tolist()
        if "kept_in_order" in case:
            assert rank_in_group(scores, pool).argsort()[:budget].tolist() == case["kept_in_order"].tolist()
