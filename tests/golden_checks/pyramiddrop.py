# SPDX-License-Identifier: Apache-2.0
"""Golden check of PyramidDrop: from hidden states and weights to the attention row, the score and kept tokens."""

from __future__ import annotations

import numpy as np
import torch

from vtprune.core.attention import visual_attention
from vtprune.core.ragged import top_k
from vtprune.core.tokens import AttentionInputs
from vtprune_kernels import attention_rows


def close(x: torch.Tensor, y: np.ndarray) -> None:
    """Scores and attention: |x-y| <= 1e-4*|y| + 1e-6*max|y|."""
    np.testing.assert_allclose(x.numpy(), y, rtol=1e-4, atol=1e-6 * np.abs(y).max())


def rotated(x: torch.Tensor, base: float = 10000.0) -> torch.Tensor:
    """Half-split rotation of `[S, H, dh]` at positions 0..S-1."""
    half = x.shape[-1] // 2
    angle = torch.arange(len(x))[:, None] * base ** (-torch.arange(half) / half)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def layer_inputs(case: dict[str, np.ndarray], rows: int) -> AttentionInputs:
    """Queries of the last `rows` tokens and all keys of the next layer."""
    hidden, heads = torch.from_numpy(case["hidden"]), int(case["num_heads"])
    normed = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + 1e-5) * torch.from_numpy(case["norm_weight"])
    q, k = (
        rotated((normed @ torch.from_numpy(case[name]).T).unflatten(-1, (heads, -1)))  # [S, H, dh]
        for name in ("q_weight", "k_weight")
    )
    start, count, length = int(case["image_start"]), int(case["num_image_tokens"]), len(hidden)
    return AttentionInputs(
        queries=q[-rows:],
        query_offsets=torch.tensor([0, rows]),
        query_order=torch.arange(length - rows, length),
        keys=k,
        values=k,
        key_offsets=torch.tensor([0, length]),
        visual=torch.arange(start, start + count),
        scaling=q.shape[-1] ** -0.5,
    )


def check(data: dict[str, np.ndarray]) -> None:
    groups = sorted({name.split("_")[0] for name in data})
    assert groups
    for group in groups:
        case = {name.removeprefix(f"{group}_"): value for name, value in data.items() if name.startswith(f"{group}_")}
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
