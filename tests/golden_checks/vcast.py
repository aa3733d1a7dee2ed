# SPDX-License-Identifier: Apache-2.0
"""Golden check of V-CAST: curvature, frame weights and budgets, scores, and kept tokens."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn.functional import normalize

from vtprune.core.frame_budget import frame_budgets
from vtprune.methods.vcast import VCast, curvature, token_scores

from .golden_files import cases, clip_of, close, same_kept


def check(data: dict[str, np.ndarray]) -> None:
    for _, case in cases(data):
        x, clip = clip_of(case)
        means = normalize(clip.frame_means(x), dim=-1)
        turns, temperature, budget = curvature(means), float(case["temperature"]), int(case["budget"])
        close(turns, case["curvature"], extra=2e-5)
        weights = torch.softmax(turns / temperature, 0)
        close(weights, case["frame_weights"], extra=2e-5)
        floor = int(case["min_per_frame"])
        assert frame_budgets(weights.tolist(), budget, clip.sizes, floor) == case["frame_budgets"].tolist()
        close(token_scores(x, clip, means), case["scores"], extra=2e-6)
        same_kept(VCast(temperature).choose_clip(x, clip, budget, None).keep, case)
