# SPDX-License-Identifier: Apache-2.0
"""Golden check of PyramidDrop: from hidden states and weights to the attention row, the score and kept tokens."""

from __future__ import annotations

import numpy as np
import torch

from vtprune.core.attention import visual_attention
from vtprune.core.ragged import top_k
from vtprune_kernels import attention_rows

from .golden_files import cases, close, layer_inputs


def check(data: dict[str, np.ndarray]) -> None:
    for _, case in cases(data):
        count, budget, stage = (int(case[name]) for name in ("num_image_tokens", "budget", "stage"))
        share = round(float(case["ratios"][stage]), 6)
        assert int(int(case["num_image_tokens_original"]) * share) == budget

        inputs = layer_inputs(case, rows=1)
        arguments = (inputs.queries, inputs.keys, inputs.query_offsets, inputs.key_offsets, inputs.query_order)
        close(attention_rows(*arguments, inputs.scaling, reduce="none")[:, 0], case["attention_row"])
        scores = visual_attention(inputs)
        close(scores, case["scores"])
        kept = top_k(scores, torch.tensor([0, count]), torch.tensor([budget])).nonzero().flatten()
        assert kept.tolist() == case["kept"].tolist()
