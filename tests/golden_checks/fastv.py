# SPDX-License-Identifier: Apache-2.0
"""Golden check of FastV: the attention row, the score and kept tokens."""

from __future__ import annotations

import numpy as np
import torch

from vtprune.core.attention import visual_attention
from vtprune.core.ragged import rank_in_group, top_k
from vtprune.core.tokens import AttentionInputs
from vtprune_kernels import attention_rows


def close(x: torch.Tensor, y: np.ndarray) -> None:
    """Scores and attention: |x-y| <= 1e-4*|y| + 1e-6*max|y|."""
    np.testing.assert_allclose(x.numpy(), y, rtol=1e-4, atol=1e-6 * np.abs(y).max())


def check(data: dict[str, np.ndarray]) -> None:
    groups = sorted({name.split("_")[0] for name in data})
    assert groups
    for group in groups:
        case = {name.removeprefix(f"{group}_"): value for name, value in data.items() if name.startswith(f"{group}_")}
        start, count, budget = (int(case[name]) for name in ("image_start", "num_image_tokens", "budget"))
        keys = torch.from_numpy(case["keys"]).transpose(0, 1)  # [S, H, dh]
        length = len(keys)
        inputs = AttentionInputs(
            queries=torch.from_numpy(case["query_last"])[None],
            query_offsets=torch.tensor([0, 1]),
            query_order=torch.tensor([length - 1]),
            keys=keys,
            values=keys,
            key_offsets=torch.tensor([0, length]),
            visual=torch.arange(start, start + count),
            scaling=keys.shape[-1] ** -0.5,
        )
        rows = attention_rows(
            inputs.queries,
            keys,
            inputs.query_offsets,
            inputs.key_offsets,
            inputs.query_order,
            inputs.scaling,
            reduce="none",
        )
        close(rows[:, 0], case["attention_row"])
        scores = visual_attention(inputs)
        close(scores, case["scores"])

        offsets = torch.tensor([0, count])
        kept = top_k(scores, offsets, torch.tensor([budget])).nonzero().flatten()
        assert kept.tolist() == case["kept"].tolist()
        order = rank_in_group(scores, offsets).argsort()[:budget]
        assert order.tolist() == case["kept_in_order"].tolist()
        survivors = [*range(start), *(kept + start).tolist(), *range(start + count, length)]
        assert survivors == case["keep_sequence_indices"].tolist()
