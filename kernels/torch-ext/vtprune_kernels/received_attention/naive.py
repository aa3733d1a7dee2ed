# SPDX-License-Identifier: Apache-2.0
"""Attention that each token of a vision layer receives: the specification, one head and segment at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from .._ragged import spans


def received_attention(
    queries: Tensor, keys: Tensor, scaling: float, rows: Tensor | None = None, offsets: Tensor | None = None
) -> Tensor:
    """See `vtprune_kernels.received_attention`."""
    batch, heads, length, _ = queries.shape
    heads_per_group = heads // keys.shape[1]
    asking = torch.ones(batch, length, dtype=torch.bool) if rows is None else rows.expand(batch, length)
    offsets = torch.tensor([0, length]) if offsets is None else offsets
    result = torch.zeros(batch, length, device=keys.device, dtype=torch.float32)
    for sample in range(batch):
        for start, stop in spans(offsets):
            chosen = asking[sample, start:stop]
            if not chosen.any():
                continue
            for head in range(heads):
                q = queries[sample, head, start:stop].float()[chosen]
                k = keys[sample, head // heads_per_group, start:stop].float()
                result[sample, start:stop] += torch.softmax(scaling * q @ k.T, -1).mean(0) / heads
    return result
