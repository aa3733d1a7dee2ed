# SPDX-License-Identifier: Apache-2.0
"""Attention of a few query rows on a GPU: one pass for the normalisers, one for the result."""

from __future__ import annotations

import torch
from torch import Tensor

from .._ragged import on
from .._triton_attention import normalisers, reduce_columns, rows_of, write_rows


def attention_rows(
    queries: Tensor,
    keys: Tensor,
    query_segments: Tensor,
    key_segments: Tensor,
    query_order: Tensor,
    scaling: float,
    softcap: float | None = None,
    reduce: str = "mean",
    weights: Tensor | None = None,
    longest: int | None = None,
) -> Tensor:
    """See `vtprune_kernels.attention_rows`."""
    rows = rows_of(queries, keys, query_segments, key_segments, query_order, scaling, softcap)
    count, heads, device = len(queries), queries.shape[1], keys.device
    if reduce != "mean":
        if longest is None:
            longest = int(key_segments.diff().max()) if len(key_segments) > 1 else 0
        if count == 0 or longest == 0:
            return torch.zeros((heads, count, longest) if reduce == "none" else (count, longest), device=device)
        result = write_rows(rows, normalisers(rows), longest)
        return result if reduce == "none" else result.mean(0)
    if count == 0 or len(keys) == 0:
        return torch.zeros(len(keys), device=device)
    weight = torch.ones(count, device=device) if weights is None else on(weights, device).float()
    totals = torch.cat([weight.new_zeros(1), weight.double().cumsum(0)])[rows.query_segments].diff()
    lengths = rows.query_segments.diff()
    sample = torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths, output_size=count)
    weight = torch.nan_to_num(weight / totals[sample] / heads, nan=0.0, posinf=0.0, neginf=0.0).float()
    everything = torch.arange(len(keys), device=device)
    return reduce_columns(rows, normalisers(rows), everything, rows.key_segments, "attention", weights=weight).sum(0)
