# SPDX-License-Identifier: Apache-2.0
"""Attention that each token of a vision layer receives, on a GPU: `attention_rows` without a causal mask."""

from __future__ import annotations

import torch
from torch import Tensor

from ..attention_rows.triton import attention_rows


def received_attention(
    queries: Tensor, keys: Tensor, scaling: float, rows: Tensor | None = None, offsets: Tensor | None = None
) -> Tensor:
    """See `vtprune_kernels.received_attention`."""
    batch, heads, length, _ = queries.shape
    device = keys.device
    if offsets is None:
        offsets = torch.arange(2, device=device) * length
    starts = torch.arange(batch, device=offsets.device)[:, None] * length
    offsets = torch.cat([(starts + offsets[:-1]).flatten(), offsets.new_full((1,), batch * length)])  # [B S + 1]
    weights = None if rows is None else rows.expand(batch, length).reshape(-1)
    q, k = (x.transpose(1, 2).flatten(0, 1) for x in (queries, keys))  # [B N, H, dh]
    order = torch.full((batch * length,), length, device=device)
    return attention_rows(q, k, offsets, offsets, order, scaling, weights=weights).view(batch, length)
