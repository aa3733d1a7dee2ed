# SPDX-License-Identifier: Apache-2.0
"""Attention that each token of a vision layer receives, as matrix products over blocks of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from .._ragged import spans

_BLOCK = 1 << 19  # attention values in memory at a time: 2 MiB, which stay in a core's cache


def received_attention(
    queries: Tensor, keys: Tensor, scaling: float, rows: Tensor | None = None, offsets: Tensor | None = None
) -> Tensor:
    """See `vtprune_kernels.received_attention`."""
    batch, heads, length, _ = queries.shape
    groups = keys.shape[1]
    asking = None if rows is None else rows.expand(batch, length)
    result = torch.zeros(batch, length, device=keys.device, dtype=torch.float32)
    for start, stop in [(0, length)] if offsets is None else spans(offsets):
        step = max(1, _BLOCK // (heads * max(1, stop - start)))
        for sample in range(batch):
            q = queries[sample, :, start:stop]  # [H, n, dh]
            if asking is not None:
                q = q[:, asking[sample, start:stop]]
            if q.shape[1] == 0:
                continue
            k = keys[sample, :, start:stop].float().transpose(1, 2)  # [G, dh, n]
            for block in q.split(step, 1):
                grouped = block.float().mul(scaling).unflatten(0, (groups, -1)).flatten(1, 2)  # [G, H/G r, dh]
                attention = torch.softmax(grouped @ k, -1)
                result[sample, start:stop] += attention.sum((0, 1)) / (heads * q.shape[1])
    return result
