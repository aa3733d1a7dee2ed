# SPDX-License-Identifier: Apache-2.0
"""Log-magnitude of the rank-one updates for a few query rows: the specification, one row and head at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._ragged import spans


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
    """See `vtprune_kernels.rank1_relevance`."""
    heads_per_group = queries.shape[1] // keys.shape[1]
    result = torch.full((len(visual),), -torch.inf, device=keys.device, dtype=torch.float32)
    samples = zip(spans(query_offsets), spans(key_offsets), strict=True)
    for (first_row, last_row), (start, stop) in samples:
        of_sample = (visual >= start) & (visual < stop)
        places = visual[of_sample] - start
        log_magnitudes = []
        for row in range(first_row, last_row):
            for head in range(queries.shape[1]):
                group = head // heads_per_group
                logits = scaling * (keys[start:stop, group].float() @ queries[row, head].float())  # [n]
                if softcap is not None:
                    logits = softcap * torch.tanh(logits / softcap)
                logits[int(query_order[row]) + 1 :] = -torch.inf
                normalizer = torch.logsumexp(logits if normalize == "visible" else logits[places], 0)
                length = torch.log(values[visual[of_sample], group].float().norm(dim=-1) + 1e-12)
                attention = torch.where(logits[places] > -torch.inf, logits[places] - normalizer, -torch.inf)
                log_magnitudes.append(attention + length)
        if log_magnitudes:
            stack = torch.stack(log_magnitudes)  # [rows * H, visual of the sample]
            if reduce == "max":
                result[of_sample] = stack.amax(0)
            else:
                power = 1 if reduce == "mean" else 2
                result[of_sample] = (torch.logsumexp(power * stack, 0) - math.log(len(stack))) / power
    return result
