# SPDX-License-Identifier: Apache-2.0
"""Attention of a few query rows: the specification, one row and head at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from .._ragged import spans


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
    heads = queries.shape[1]
    heads_per_group = heads // keys.shape[1]
    if max_length is None:
        max_length = int(key_offsets.diff().max()) if len(key_offsets) > 1 else 0
    rows = torch.zeros(heads, len(queries), max_length, device=keys.device, dtype=torch.float32)
    mean = torch.zeros(len(keys), device=keys.device, dtype=torch.float32)
    for (first, last), (start, stop) in zip(spans(query_offsets), spans(key_offsets), strict=True):
        weight = torch.ones(last - first, dtype=torch.float32) if weights is None else weights[first:last].float()
        for row in range(first, last):
            for head in range(heads):
                logits = scaling * (keys[start:stop, head // heads_per_group].float() @ queries[row, head].float())
                if softcap is not None:
                    logits = softcap * torch.tanh(logits / softcap)
                logits[int(query_order[row]) + 1 :] = -torch.inf
                attention = torch.softmax(logits, 0)
                rows[head, row, : stop - start] = attention
                if weight.sum() != 0:
                    mean[start:stop] += attention * weight[row - first] / weight.sum() / heads
    return rows if reduce == "none" else mean
