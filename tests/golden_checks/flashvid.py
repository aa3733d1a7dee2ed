# SPDX-License-Identifier: Apache-2.0
"""Golden check of FlashVID before the decoder: segments, picks, trees, clusters, and the released code's counts."""

from __future__ import annotations

import math

import numpy as np
import torch

from vtprune.core.clips import cut_segments
from vtprune.methods.flashvid import FlashVID

from .golden_files import cases, clip_of, merged_close, same_kept


def check(data: dict[str, np.ndarray]) -> None:
    for _, case in cases(data):
        x, clip = clip_of(case)
        attention, places = torch.from_numpy(case["attention"]).flatten(), clip.sizes[0]
        method = FlashVID(
            selected=float(case["selection_share"]),
            temporal=float(case["temporal_threshold"]),
            threshold=float(case["segment_threshold"]),
            segments=int(case["segments_min"]),
            events=bool(case["event_term"]),
        )
        means = clip.frame_means(x)
        segments = cut_segments(torch.cosine_similarity(means[1:], means[:-1]), method.segments, method.threshold)
        assert segments == case["segment_sizes"].tolist()

        each = math.ceil(places * float(case["ratio"]) * float(case["expansion"]))
        assert each == int(case["frame_budget"])
        select = math.ceil(method.selected * each)
        picked = method.pick(x, clip, attention, segments, [select] * clip.frames)
        assert torch.stack(picked).remainder(places).tolist() == case["selected"].tolist()

        links = method.links(x, clip, picked, segments, [each] * clip.frames)
        assert torch.where(links < 0, -1, links % places).tolist() == case["merged_to"].flatten().tolist()

        taken = torch.zeros(len(x), dtype=torch.bool)
        taken[torch.cat(picked)] = True
        roots = torch.bincount(clip.frame[(links < 0) & ~taken], minlength=clip.frames)
        counts = []
        for here in roots.split(segments):
            share = min(1.0, (each - select) * len(here) / max(1, int(here.sum())))
            counts += [math.ceil(n * share) for n in here.tolist()]
        chosen = method.merge(x, clip, attention, picked, links, counts)
        same_kept(chosen.keep, case)
        merged_close(chosen.states[chosen.keep.argsort()], case["output_features"])
