# SPDX-License-Identifier: Apache-2.0
"""Golden check of DyCoke's temporal part: similarities, and kept tokens."""

from __future__ import annotations

import numpy as np

from vtprune.methods.dycoke import DyCoke, similarity

from .golden_files import cases, clip_of, close, same_kept


def check(data: dict[str, np.ndarray]) -> None:
    for _, case in cases(data):
        x, clip = clip_of(case)
        close(similarity(x, clip), case["similarity"], extra=1e-6)
        chosen = DyCoke().choose_clip(x, clip, int(case["kept_count"]), None)
        same_kept(chosen.keep, case)
        assert int(case["frame_budget"]) == int(float(case["frame_ratio"]) * clip.sizes[0])
