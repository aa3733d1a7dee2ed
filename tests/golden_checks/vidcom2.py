# SPDX-License-Identifier: Apache-2.0
"""Golden check of VidCom2: channels, both similarities, frame shares, and kept tokens with and without correction."""

from __future__ import annotations

import numpy as np

from vtprune.methods.vidcom2 import calm_channels, frame_shares, most_distinct, similarities

from .golden_files import cases, clip_of, close, same_kept


def check(data: dict[str, np.ndarray]) -> None:
    for _, case in cases(data):
        x, clip = clip_of(case)
        assert calm_channels(x).tolist() == case["channels"].tolist()
        to_clip, to_frame = similarities(x, clip)
        close(to_clip, case["video_scores"])
        close(to_frame, case["frame_scores"])
        shares = frame_shares(to_clip, clip, float(case["ratio"]))
        close(shares, case["frame_shares"], extra=2e-5)  # a temperature of 0.01 multiplies rounding errors by 100
        counts = [max(1, round(s * n)) for s, n in zip(shares.tolist(), clip.sizes, strict=True)]
        assert counts == case["release_frame_budgets"].tolist()
        scores = to_clip + to_frame
        assert most_distinct(scores, clip, counts, sum(counts)).tolist() == case["release_kept"].tolist()
        same_kept(most_distinct(scores, clip, counts, int(case["budget"])), case)
