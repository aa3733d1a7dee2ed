# SPDX-License-Identifier: Apache-2.0
"""Golden check of FastV: the attention row, the score and kept tokens."""

from __future__ import annotations

import numpy as np
import torch

from vtprune.core.attention import visual_attention
from vtprune.core.ragged import rank_in_group, top_k
from vtprune_kernels import attention_rows

from .golden_files import attention_inputs, cases, close


def check(data: dict[str, np.ndarray]) -> None:
    for _, case in cases(data):
        start, count, budget = (int(case[name]) for name in ("image_start", "num_image_tokens", "budget"))
        keys = torch.from_numpy(case["keys"]).transpose(0, 1)  # [S, H, dh]
        inputs = attention_inputs(case, torch.from_numpy(case["query_last"])[None], keys)
        arguments = (inputs.queries, keys, inputs.query_offsets, inputs.key_offsets, inputs.query_order)
        close(attention_rows(*arguments, inputs.scaling, reduce="none")[:, 0], case["attention_row"])
        scores = visual_attention(inputs)
        close(scores, case["scores"])

        offsets = torch.tensor([0, count])
        kept = top_k(scores, offsets, torch.tensor([budget])).nonzero().flatten()
        assert kept.tolist() == case["kept"].tolist()
        order = rank_in_group(scores, offsets).argsort()[:budget]
        assert order.tolist() == case["kept_in_order"].tolist()
        survivors = [*range(start), *(kept + start).tolist(), *range(start + count, len(keys))]
        assert survivors == case["keep_sequence_indices"].tolist()
