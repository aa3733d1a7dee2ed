# SPDX-License-Identifier: Apache-2.0
"""Golden check of HoliTom before the decoder: windows, static places, picks and clusters; counts of the release."""

from __future__ import annotations

import math

import numpy as np
import torch

from vtprune.methods.holitom import HoliTom, next_similarity, split

from .clip_data import cases, clip_of, close, merged_close


def check_clip(case: dict[str, np.ndarray]) -> None:
    x, clip = clip_of(case)
    similarity = next_similarity(x, clip)
    close(similarity, case["similarity"], extra=1e-6)
    parts = split(similarity, clip, float(case["threshold"]))
    assert [list(window) for window in parts.windows] == case["windows"].tolist()
    assert [rows.shape[1] for rows in parts.static] == case["static_places"].tolist()
    assert parts.saved == int(case["reduced"])

    ratio = min(1, float(case["ratio"]) / (1 - parts.saved / len(x)))
    assert math.isclose(ratio, float(case["ratio_adjusted"]))
    method = HoliTom(
        threshold=float(case["threshold"]),
        context_share=float(case["context_share"]),
        neighbors=int(case["knn"]),
        beta=float(case["beta"]),
        plain_mean=bool(case["plain_mean"]),
    )
    static = [round(rows.shape[1] * ratio) for rows in parts.static]
    moving = [math.ceil(len(rows) * ratio) for rows in parts.moving]
    chosen = method.merge(x, torch.from_numpy(case["attention"]).flatten(), parts, static, moving)
    assert len(chosen.keep) == int(case["kept_count"])

    expected = case["out_frame"] * clip.sizes[0] + case["out_place"]
    order = np.argsort(expected)
    assert chosen.keep.sort().values.tolist() == expected[order].tolist()
    merged_close(chosen.states[chosen.keep.argsort()], case["output_features"][order])


def check(data: dict[str, np.ndarray]) -> None:
    for group, case in cases(data):
        if group != "llm":  # the second cut inside the language model, which this package leaves out
            check_clip(case)
