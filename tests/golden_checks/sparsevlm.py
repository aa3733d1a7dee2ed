# SPDX-License-Identifier: Apache-2.0
"""Golden check of SparseVLM and SparseVLM+: raters, scores, kept tokens, and the target of each recycled token."""

from __future__ import annotations

import numpy as np
import torch

from vtprune.core.ragged import rank_in_group, top_k
from vtprune.methods.sparsevlm.recycling import density_peaks, recycle, recycled, split_budget
from vtprune.methods.sparsevlm.rotation import priority_heads, rope_weights
from vtprune.methods.sparsevlm.text_raters import rater_scores, raters

from .golden_files import cases, close, merged_close


def equal(x: torch.Tensor, y: np.ndarray) -> None:
    assert x.tolist() == y.tolist()


def check_recycling(case: dict[str, np.ndarray], scores: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
    """Returns the recycled tokens in the order of the file."""
    count, budget = len(scores), int(case["budget"])
    members, clusters = recycled(count - budget)
    assert (members, clusters) == (len(case["recycled_indices"]), int(case["cluster_num"]))
    dropped = torch.ones(count, dtype=torch.bool)
    dropped[torch.from_numpy(case["kept"])] = False
    order = rank_in_group(scores.masked_fill(~dropped, -torch.inf), torch.tensor([0, count])).argsort()
    rows = order[:members]
    equal(rows, case["recycled_indices"])
    group, centers = density_peaks(visual[rows], clusters)
    equal(group, case["cluster_assignment"])
    equal(centers, case["cluster_centers"])

    total = budget + clusters
    if split_budget(count, total) != (
        budget,
        clusters,
    ):  # if two splits have the same sum, the library keeps one token more
        assert split_budget(count, total) == (budget + 1, clusters - 1)
        return torch.stack([visual[rows][group == c].mean(0) for c in range(clusters)])
    keep, merged = recycle(visual, scores, scores, torch.tensor([0, count]), torch.tensor([total]))
    expected = set(case["kept"].tolist()) | set(rows[centers].tolist())
    assert set(keep.nonzero().flatten().tolist()) == expected
    kept = torch.from_numpy(case["kept"])
    assert torch.equal(merged[kept], visual[kept])
    return merged[rows[centers]]


def check(data: dict[str, np.ndarray]) -> None:
    for _, case in cases(data):
        start, count, budget = (int(case[name]) for name in ("image_start", "num_image_tokens", "budget"))
        end = start + count
        embeds, hidden = torch.from_numpy(case["input_embeds"]), torch.from_numpy(case["layer_output"])
        rating = rater_scores(embeds[start:end], embeds[end:])
        close(rating, case["rater_scores"])
        chosen = raters(rating).nonzero().flatten()
        equal(chosen, case["rater_indices"])

        attention = torch.from_numpy(case["text_attention_rows"])[:, chosen]  # [H, r, N]
        if int(case["version2"]):
            ids = torch.from_numpy(case["position_ids"])  # with gaps after an earlier cut
            divisor = rope_weights(ids[end:, None] - ids[start:end], head_size=128)
            close(divisor, case["rope_weights"])
            attention = attention / divisor[chosen]
            heads = priority_heads(attention, len(case["selected_heads"]))
            equal(heads.nonzero().flatten(), case["selected_heads"])
            attention = attention[heads]
        scores = attention.mean(dim=(0, 1))
        close(scores, case["scores"])
        keep = top_k(scores, torch.tensor([0, count]), torch.tensor([budget])).nonzero().flatten()
        equal(keep, case["kept"])

        survivors = torch.cat([torch.arange(start), keep + start, torch.arange(end, len(hidden))])
        sequence, positions = hidden[survivors], torch.from_numpy(case["position_ids"])
        if int(case["version2"]):
            positions = positions[survivors]  # original ids
        else:
            merged = check_recycling(case, scores, hidden[start:end])
            merged_close(merged, case["merged_features"])
            sequence = torch.cat([sequence[: start + budget], merged, sequence[start + budget :]])
            positions = positions[: len(sequence)]  # compact ids
        merged_close(sequence, case["output_sequence"])
        equal(positions, case["output_position_ids"])
