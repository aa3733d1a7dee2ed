# SPDX-License-Identifier: Apache-2.0
"""Log-magnitude of rank-one updates on a GPU: one pass for the log-sum-exp, one over the visual keys."""

from __future__ import annotations

import torch
from torch import Tensor

from .._ragged import on
from .._triton_attention import NEVER, normalizers, reduce_columns, rows_of


def rank1_relevance(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    query_offsets: Tensor,
    key_offsets: Tensor,
    query_order: Tensor,
    visual: Tensor,
    scaling: float,
    reduce: str = "mean",
    normalize: str = "visible",
    softcap: float | None = None,
) -> Tensor:
    """See `vtprune_kernels.rank1_relevance`; `visual` must be ascending."""
    if len(queries) == 0 or len(visual) == 0:
        return torch.full((len(visual),), NEVER, device=keys.device, dtype=torch.float32)
    rows = rows_of(queries, keys, query_offsets, key_offsets, query_order, scaling, softcap)
    visual = on(visual, keys.device)
    chosen = None
    if normalize == "visual":
        chosen = torch.zeros(len(keys), dtype=torch.uint8, device=keys.device).index_fill_(0, visual, 1)
    offsets = torch.searchsorted(visual, rows.key_offsets)
    z = normalizers(rows, chosen)
    if reduce == "max":
        return reduce_columns(rows, z, visual, offsets, "max", values).amax(0)
    power = 2.0 if reduce == "rms" else 1.0
    total = torch.logsumexp(reduce_columns(rows, z, visual, offsets, "sum", values, power=power), 0)
    count = rows.query_offsets.diff() * queries.shape[1]
    sample = torch.searchsorted(rows.key_offsets, visual, right=True) - 1
    return torch.nan_to_num((total - torch.log(count[sample].float())) / power, nan=NEVER, neginf=NEVER)
