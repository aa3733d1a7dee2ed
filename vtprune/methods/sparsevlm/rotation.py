# SPDX-License-Identifier: Apache-2.0
"""Attention corrected for the effect of rotary positions, as in SparseVLM+ (arXiv 2410.04417)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vtprune_kernels import attention_rows

from ...core.ragged import group_ids, top_k
from ...core.tokens import AttentionInputs

if TYPE_CHECKING:
    from ...models.anatomy import Anatomy

HEADS = 14 / 32  # share of the heads; the release takes 14 of 32


def rope_weights(distance: Tensor, head_size: int, base: float = 10000.0) -> Tensor:
    """Logits between vectors of ones that differ only by rotation: `2 / sqrt(dh) * sum_j cos(distance * theta_j)`."""
    theta = base ** (-torch.arange(0, head_size, 2, device=distance.device) / head_size)
    return 2 * torch.cos(distance[..., None] * theta).sum(-1) * head_size**-0.5


def rope_base(anatomy: Anatomy | None) -> float:
    """Base of the decoder's rotary embedding, from its config; 10000 where the config has none."""
    config = getattr(getattr(anatomy, "decoder", None), "config", None)
    parameters = getattr(config, "rope_parameters", None) or {}
    bases = [p["rope_theta"] for p in (parameters, *parameters.values()) if isinstance(p, dict) and "rope_theta" in p]
    return float(bases[0]) if bases else 10000.0


def priority_heads(attention: Tensor, count: int) -> Tensor:
    """`[H]` bool: the `count` heads with the largest sum of `attention` `[H, r, n]`."""
    mass = attention.sum(dim=(1, 2))
    return top_k(mass, torch.tensor([0, len(mass)], device=mass.device), torch.tensor([count]))


def corrected_attention(
    inputs: AttentionInputs,
    rate: Tensor,
    distances: Sequence[Tensor],
    offsets: Tensor,
    base: float,
    heads: int | None,
    floor: float,
) -> Tensor:
    """Attention from some text tokens, divided by `rope_weights`, mean over these and over the heads with most of it.

    Args:
        inputs: Queries and keys of one layer.
        rate: `[R]` bool, the text tokens that rate.
        distances: For every sample `[r, n]` distances from these to the visual tokens, along the prompt.
        offsets: `[S + 1]` offsets of the visual tokens.
        base: Base of the rotary embedding.
        heads: Number of heads, or None for 14/32 of them.
        floor: Smallest divisor, as a share of the divisor at distance 0.

    Returns:
        Tensor: `[M]` float32.
    """
    rows = rate.nonzero().flatten()
    sample = group_ids(inputs.query_offsets, len(rate))[rows]
    counts = torch.bincount(sample, minlength=len(offsets) - 1)
    ends = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    attention = attention_rows(
        inputs.queries[rows],
        inputs.keys,
        ends,
        inputs.key_offsets,
        inputs.query_order[rows],
        inputs.scaling,
        inputs.softcap,
        reduce="none",
    )  # [H, r, L]
    position = inputs.visual - inputs.key_offsets[:-1][group_ids(offsets, len(inputs.visual))]  # [M]
    size, count = inputs.queries.shape[-1], heads or max(1, round(HEADS * len(attention)))
    scores = []
    parts = zip(attention.split(counts.tolist(), 1), position.split(offsets.diff().tolist()), distances, strict=True)
    for received, places, distance in parts:
        divisor = rope_weights(distance, size, base).clamp_min(floor * size**0.5)
        corrected = received[:, :, places] / divisor  # [H, r, n]
        scores.append(corrected[priority_heads(corrected, min(count, len(corrected)))].mean(dim=(0, 1)))
    return torch.cat(scores)
