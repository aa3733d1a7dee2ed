# SPDX-License-Identifier: Apache-2.0
"""Golden check of VisionZip: attention of the class token, dominant patches, contextual tokens."""

from __future__ import annotations

import numpy as np
import torch

from vtprune.methods.visionzip import assign, contextual_targets, merge
from vtprune.vision.tower import Attention
from vtprune_kernels import attention_rows

from .golden_files import cases, close, merged_close


def check(data: dict[str, np.ndarray]) -> None:
    for _, case in cases(data):
        query, keys = torch.from_numpy(case["query_cls"]), torch.from_numpy(case["keys"])  # [H, dh], [H, N + 1, dh]
        (heads, length, size), scaling = keys.shape, keys.shape[-1] ** -0.5
        whole, last = torch.tensor([0, length]), torch.tensor([length - 1])
        seen = attention_rows(
            query[None], keys.transpose(0, 1), torch.tensor([0, 1]), whole, last, scaling, reduce="none"
        )
        close(seen[:, 0, 1:], case["cls_attention"])
        queries = torch.zeros(1, heads, length, size)
        queries[0, :, 0] = query
        scores = Attention(queries, keys[None], scaling, None, None, 1).of_class_token()[0, 1:]
        close(scores * heads, case["scores"])
        close(keys.mean(0), case["metric"])

        dominant, count = int(case["dominant_num"]) - 1, int(case["contextual_num"])
        order = scores.sort(descending=True, stable=True).indices[:dominant]
        np.testing.assert_array_equal(order, case["kept_in_order"])
        np.testing.assert_array_equal(order.sort().values, case["kept"])
        free = torch.ones(length - 1, dtype=torch.bool)
        free[order] = False
        rest = free.nonzero()[:, 0]
        targets = contextual_targets(len(rest), count)
        np.testing.assert_array_equal(rest[targets], case["contextual_targets"])
        belongs = assign(keys.mean(0)[1:][rest], targets)
        assignment = torch.full((length - 1,), -1)
        assignment[rest] = belongs
        np.testing.assert_array_equal(assignment, case["contextual_assignment"])
        states = torch.from_numpy(case["hidden_states"])
        contextual = merge(states[1:][rest], targets, belongs)
        merged_close(contextual, case["contextual_features"])
        output = torch.cat([states[:1], states[1:][order.sort().values], contextual])
        merged_close(output, case["output_features"])
