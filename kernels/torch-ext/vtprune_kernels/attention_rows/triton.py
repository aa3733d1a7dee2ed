# SPDX-License-Identifier: Apache-2.0
"""Attention of a few query rows on a GPU: one pass for the log-sum-exp, one for the result."""

from __future__ import annotations

import torch
from torch import Tensor

from .._ragged import on
from .._triton_attention import normalizers, reduce_columns, rows_of, write_rows


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
    rows = rows_of(queries, keys, query_offsets, key_offsets, query_order, scaling, softcap)
    count, heads, device = len(queries), queries.shape[1], keys.device
    if reduce == "none":
        if max_length is None:
            max_length = int(key_offsets.diff().max()) if len(key_offsets) > 1 else 0
        if count == 0 or max_length == 0:
            return torch.zeros(heads, count, max_length, device=device, dtype=torch.float32)
        return write_rows(rows, normalizers(rows), max_length)
    if count == 0 or len(keys) == 0:
        return torch.zeros(len(keys), device=device, dtype=torch.float32)
    weight = torch.ones(count, device=device, dtype=torch.float32) if weights is None else on(weights, device).float()
    lengths = rows.query_offsets.diff()
    sample = torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths, output_size=count)
    totals = torch.zeros(len(lengths), device=device, dtype=torch.float64).index_add_(0, sample, weight.double())
    weight = torch.nan_to_num(weight / totals[sample] / heads, nan=0.0, posinf=0.0, neginf=0.0).float()
    everything = torch.arange(len(keys), device=device)
    return reduce_columns(rows, normalizers(rows), everything, rows.key_offsets, "attention", weights=weight).sum(0)
