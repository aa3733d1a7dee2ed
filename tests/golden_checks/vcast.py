# SPDX-License-Identifier: Apache-2.0
"""Golden check of V-CAST: curvature, frame weights and budgets, scores, and kept tokens."""

from __future__ import annotations

import numpy as np
import torch

from vtprune.core.frame_budget import frame_budgets
from vtprune.methods.vcast import VCast, curvature, most_unusual, token_scores, unit_means

from .golden_files import cases, clip_of, close, same_kept


def check(data: dict[str, np.ndarray]) -> None:
    for _, case in cases(data):
        x, clip = clip_of(case)
        means = unit_means(x, clip)
        turns, temperature, budget = curvature(means), float(case["temperature"]), int(case["budget"])
        close(turns, case["curvature"], extra=2e-5)
        weights = torch.softmax(turns / temperature, 0)
        close(weights, case["frame_weights"], extra=2e-5)
        floor = int(case["min_per_frame"])
        counts = frame_budgets(weights.tolist(), budget, clip.sizes, floor)
        assert counts == case["frame_budgets"].tolist()
        scores = token_scores(x, clip, means)
        close(scores, case["scores"], extra=2e-6)
        same_kept(most_unusual(scores, clip, counts), case)
        if floor == 1:
            same_kept(VCast(temperature).choose_clip(x, clip, budget, None).keep, case)
