# SPDX-License-Identifier: Apache-2.0
"""Golden check of EVS: dissimilarity to the previous frame, and kept tokens."""

from __future__ import annotations

import numpy as np

from vtprune.methods.evs import EVS, dissimilarity

from .golden_files import cases, clip_of, close, same_kept


def check(data: dict[str, np.ndarray]) -> None:
    for _, case in cases(data):
        x, clip = clip_of(case)
        close(dissimilarity(x, clip), case["dissimilarity"], extra=2e-6)
        assert int(case["budget"]) == max(clip.sizes[0], int(len(x) * float(case["ratio"])))
        same_kept(EVS().choose_clip(x, clip, int(case["budget"]), None).keep, case)
