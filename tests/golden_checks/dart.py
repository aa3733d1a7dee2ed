# SPDX-License-Identifier: Apache-2.0
"""Golden check of DART: pivots, the order in which they select tokens, and kept tokens."""

from __future__ import annotations

import numpy as np
import torch

from vtprune.core.ragged import rank_in_group
from vtprune.methods.dart import duplication_aware, key_size

from .golden_files import cases, close


def largest(values: torch.Tensor, count: int) -> list[int]:
    ranks = rank_in_group(values, torch.tensor([0, len(values)]))
    return ranks.argsort()[:count].tolist()


def check(data: dict[str, np.ndarray]) -> None:
    for _, case in cases(data):
        start, count = int(case["image_start"]), int(case["num_image_tokens"])
        end = start + count
        size = key_size(torch.from_numpy(case["keys"]).transpose(0, 1))  # [S]
        close(size[start:end], case["image_key_l1"])
        close(size[end:], case["text_key_l1"])

        pivots = len(case["image_pivots"])
        image, text = largest(size[start:end], pivots), largest(size[end:], pivots)
        assert image == case["image_pivots"].tolist()
        assert text == case["text_pivots"].tolist()
        order = sorted([start + i for i in image] + [end + i for i in text])
        assert order == case["pivot_order"].tolist()

        requested = int(case["max_num_truncation"])
        if requested < 0:
            requested = int(count * (1 - float(case["reduction_ratio"])))
        assert requested // (2 * pivots) == int(case["tokens_per_pivot"])
        assert pivots + requested // (2 * pivots) * 2 * pivots == int(case["budget"])
        hidden = torch.from_numpy(case["hidden_normed"])
        kinds = {False: requested, True: int(case["budget"])}  # both modes agree where the count divides evenly
        for exact, budget in kinds.items():
            keep = duplication_aware(
                hidden[start:end],
                size[start:end],
                torch.tensor([0, count]),
                torch.tensor([budget]),
                hidden[end:],
                size[end:],
                torch.tensor([0, len(hidden) - end]),
                pivots,
                exact,
            )
            assert keep.nonzero().flatten().tolist() == case["kept"].tolist()
