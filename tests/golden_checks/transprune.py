# SPDX-License-Identifier: Apache-2.0
"""Golden check of TransPrune: TTV of one layer, and two cuts from hidden states, weights and TTV so far."""

from __future__ import annotations

import numpy as np
import torch

from vtprune.core.attention import visual_attention
from vtprune.core.ragged import top_k
from vtprune.core.tokens import AttentionInputs
from vtprune.methods.transprune import TransPrune, change, combine, variation
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


def layer_inputs(case: dict[str, np.ndarray]) -> AttentionInputs:
    """Queries of the text after the image and all keys of the next layer."""
    hidden, heads = torch.from_numpy(case["hidden"]), int(case["num_heads"])
    normed = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + 1e-5) * torch.from_numpy(case["norm_weight"])
    q, k = (
        rotated((normed @ torch.from_numpy(case[name]).T).unflatten(-1, (heads, -1)))  # [S, H, dh]
        for name in ("q_weight", "k_weight")
    )
    start, count, length = int(case["image_start"]), int(case["num_image_tokens"]), len(hidden)
    return AttentionInputs(
        queries=q[start + count :],
        query_offsets=torch.tensor([0, length - start - count]),
        query_order=torch.arange(start + count, length),
        keys=k,
        values=k,
        key_offsets=torch.tensor([0, length]),
        visual=torch.arange(start, start + count),
        scaling=q.shape[-1] ** -0.5,
    )


def check_variation(case: dict[str, np.ndarray]) -> None:
    whole = torch.tensor([0, len(case["ttv"])])
    parts = []
    for module in ("attn", "mlp"):
        x_in, x_out = (torch.from_numpy(case[f"{module}_{end}"]) for end in ("in", "out"))
        parts.append(variation(change(x_in, x_out), whole))
        close(parts[-1], case[f"ttv_{module}"])
    close(parts[0] + parts[1], case["ttv"])


def check_cut(case: dict[str, np.ndarray]) -> None:
    start, count, budget = (int(case[name]) for name in ("image_start", "num_image_tokens", "budget"))
    share = TransPrune().schedule(32)[int(case["stage"])].share
    assert int(int(case["num_image_tokens_original"]) * share) == budget

    inputs, pool = layer_inputs(case), torch.tensor([0, count])
    arguments = (inputs.queries, inputs.keys, inputs.query_offsets, inputs.key_offsets, inputs.query_order)
    close(attention_rows(*arguments, inputs.scaling, reduce="none"), case["attention_rows"])
    iga = visual_attention(inputs)
    close(iga / (iga.sum() + 1e-8), case["iga"])

    layers = torch.from_numpy(case["ttv_layers"])
    ttv = layers.sum(0)[start : start + count]
    close(combine(ttv, iga, pool, alpha=1.0) / 2, case["ttv_norm"])
    scores = combine(ttv, iga, pool)
    close(scores, case["scores"])
    kept = top_k(scores, pool, torch.tensor([budget])).nonzero().flatten()
    assert kept.tolist() == case["kept"].tolist()
    survivors = torch.cat([torch.arange(start), kept + start, torch.arange(start + count, layers.shape[1])])
    np.testing.assert_array_equal(layers[:, survivors].numpy(), case["ttv_layers_after"])


def check(data: dict[str, np.ndarray]) -> None:
    groups = sorted({name.split("_")[0] for name in data})
    assert groups
    for group in groups:
        case = {name.removeprefix(f"{group}_"): value for name, value in data.items() if name.startswith(f"{group}_")}
        if "attn_in" in case:
            check_variation(case)
        else:
            check_cut(case)
