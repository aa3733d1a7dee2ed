# SPDX-License-Identifier: Apache-2.0
"""Golden check of HoliTom: windows, static positions, picks, clusters, the released counts, and the decoder cut."""

from __future__ import annotations

import math

import numpy as np
import torch

from vtprune.core.ragged import top_k
from vtprune.methods.holitom import HoliTom, fold, next_similarity, split

from .golden_files import cases, clip_of, close, merged_close


def check_clip(case: dict[str, np.ndarray]) -> None:
    x, clip = clip_of(case)
    similarity = next_similarity(x, clip)
    close(similarity, case["similarity"], extra=1e-6)
    parts = split(similarity, clip, float(case["threshold"]), longest=int(case["max_window"]))
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


def check_inside(case: dict[str, np.ndarray]) -> None:
    x, attention = torch.from_numpy(case["hidden"]), torch.from_numpy(case["last_row_attention"])
    count = round(len(x) * (1 - float(case["drop_share"])))
    keep = top_k(attention, torch.tensor([0, len(x)]), torch.tensor([count])).nonzero()[:, 0]
    assert keep.tolist() == case["kept"].tolist()
    merged_close(fold(x, keep), case["merged_hidden"])


def check(data: dict[str, np.ndarray]) -> None:
    for group, case in cases(data):
        (check_inside if group == "llm" else check_clip)(case)
