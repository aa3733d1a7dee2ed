# SPDX-License-Identifier: Apache-2.0
"""Golden check of FastVID: segments, salient tokens, centers, merged features, and the released code's counts."""

from __future__ import annotations

import numpy as np
import torch

from vtprune.core.clips import cut_segments
from vtprune.core.density_peaks import log_peak_scores, pairwise_distances
from vtprune.methods.fastvid import FastVID, FramePlan, anchor_counts

from .golden_files import cases, clip_of, close, merged_close, same_kept


def check(data: dict[str, np.ndarray]) -> None:
    for _, case in cases(data):
        x, clip = clip_of(case)
        frames, attention = clip.frames, torch.from_numpy(case["attention"])
        share, stride = float(case["context_share"]), int(case["anchor_stride"])
        vectors = torch.from_numpy(case["frame_global"])
        similarity = torch.cosine_similarity(vectors[1:], vectors[:-1])
        segments = cut_segments(similarity, int(case["segments_min"]), float(case["segment_threshold"]))
        assert segments == case["segment_sizes"].tolist()

        each = int(clip.sizes[0] * float(case["ratio"]))
        context = int(each * share)
        centers = [count for length in segments for count in anchor_counts(length, context, stride)]
        assert centers == case["context_counts"].tolist()
        counts = FramePlan([each - context] * frames, centers, [count == context for count in centers])

        for t, order in enumerate(case["salient_in_order"]):
            assert attention[t].sort(descending=True, stable=True).indices[: each - context].tolist() == order.tolist()
            rest = torch.ones(clip.sizes[0], dtype=torch.bool)
            rest[torch.from_numpy(order)] = False
            scores = log_peak_scores(pairwise_distances(x.view(frames, -1, x.shape[1])[t][rest]), 4)
            close(scores.exp(), case["density_scores"][t][rest.numpy()])

        method = FastVID(
            int(case["segments_min"]), float(case["segment_threshold"]), share, stride, float(case["beta"])
        )
        chosen = method.merge(x, clip, attention.flatten(), segments, counts)
        same_kept(chosen.keep, case)
        order = chosen.keep.argsort()
        merged_close(chosen.states[order], case["output_features"])
        is_context = (order >= sum(counts.salient)).long()
        assert is_context.tolist() == case["is_context"].tolist()
