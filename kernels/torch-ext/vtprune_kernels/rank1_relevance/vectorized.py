# SPDX-License-Identifier: Apache-2.0
"""Log-magnitude of the rank-one updates as matrix products over blocks of query rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._ragged import spans

_BLOCK = 1 << 22  # logits in memory at a time


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
    groups, per_group = keys.shape[1], queries.shape[1] // keys.shape[1]
    power = 2.0 if reduce == "rms" else 1.0
    result = torch.full((len(visual),), -torch.inf, device=keys.device)
    for (first, last), (start, stop) in zip(spans(query_offsets), spans(key_offsets), strict=True):
        of_sample = torch.nonzero((visual >= start) & (visual < stop)).squeeze(1)
        if first == last or len(of_sample) == 0:
            continue
        places = _range(visual[of_sample] - start)
        length = torch.log(values[visual[of_sample]].float().norm(dim=-1) + 1e-12).T  # [G, m]
        k = keys[start:stop].permute(1, 2, 0).float()  # [G, dh, n]
        step = max(1, _BLOCK // (groups * per_group * (stop - start)))
        total = torch.full_like(length, -torch.inf)
        for row in range(first, last, step):
            rows = slice(row, min(row + step, last))
            q = queries[rows].float().mul(scaling).unflatten(1, (groups, per_group)).transpose(0, 1)  # [G, r, H/G, dh]
            logits = q.flatten(1, 2) @ k  # [G, r H/G, n]
            if softcap is not None:
                logits = logits.div_(softcap).tanh_().mul_(softcap)
            hidden = torch.arange(stop - start, device=keys.device) > query_order[rows, None]  # [r, n]
            if bool(hidden.any()):
                logits.masked_fill_(hidden.repeat_interleave(per_group, 0), -torch.inf)
            seen = logits[..., places]  # [G, r H/G, m]
            normalizer = torch.logsumexp(logits if normalize == "visible" else seen, -1, keepdim=True)
            # A row that attends to none of the keys it is normalized over contributes nothing.
            attention = seen - normalizer.masked_fill_(normalizer == -torch.inf, 0)
            if reduce == "max":
                total = torch.maximum(total, attention.amax(1))
            else:
                total = torch.logaddexp(total, torch.logsumexp(attention.mul_(power) if power > 1 else attention, 1))
        if reduce == "max":
            result[of_sample] = (total + length).amax(0)
        else:
            count = (last - first) * queries.shape[1]
            result[of_sample] = (torch.logsumexp(total + power * length, 0) - math.log(count)) / power
    return result


def _range(places: Tensor) -> Tensor | slice:
    """Consecutive places as a slice, which does not copy; others unchanged."""
    first, last = int(places[0]), int(places[-1])
    return slice(first, last + 1) if last - first + 1 == len(places) else places
