# SPDX-License-Identifier: Apache-2.0
"""Attention of a few query rows as matrix products over blocks of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from .._ragged import spans

_BLOCK = 1 << 22  # attention values in memory at a time


def attention_rows(
    queries: Tensor,
    keys: Tensor,
    query_offsets: Tensor,
    key_offsets: Tensor,
    query_order: Tensor,
    scaling: float,
    softcap: float | None = None,
    reduce: str = "mean",
    weights: Tensor | None = None,
    max_length: int | None = None,
) -> Tensor:
    """See `vtprune_kernels.attention_rows`."""
    heads, groups = queries.shape[1], keys.shape[1]
    if max_length is None:
        max_length = int(key_offsets.diff().max()) if len(key_offsets) > 1 else 0
    shape = (len(keys),) if reduce == "mean" else (heads, len(queries), max_length)
    result = torch.zeros(shape, device=keys.device, dtype=torch.float32)
    for (first, last), (start, stop) in zip(spans(query_offsets), spans(key_offsets), strict=True):
        length = stop - start
        if first == last or length == 0:
            continue
        weight = queries.new_ones(last - first, dtype=torch.float32) if weights is None else weights[first:last].float()
        weight = torch.nan_to_num(weight / weight.sum(), nan=0.0, posinf=0.0, neginf=0.0)
        k = keys[start:stop].permute(1, 2, 0).float()  # [G, dh, n]
        step = max(1, _BLOCK // (heads * length))
        for row in range(first, last, step):
            rows = slice(row, min(row + step, last))
            q = queries[rows].float().mul(scaling).unflatten(1, (groups, -1)).permute(1, 2, 0, 3)  # [G, H/G, r, dh]
            logits = (q.flatten(1, 2) @ k).unflatten(1, q.shape[1:3]).flatten(0, 1)  # [H, r, n]
            if softcap is not None:
                logits = logits.div_(softcap).tanh_().mul_(softcap)
            hidden = torch.arange(length, device=keys.device) > query_order[rows, None]  # [r, n]
            attention = torch.softmax(logits.masked_fill_(hidden, -torch.inf), -1)
            if reduce == "none":
                result[:, rows, :length] = attention
            else:
                result[start:stop] += weight[rows.start - first : rows.stop - first] @ attention.mean(0)
    return result
