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
    result, alone = [], len(key_offsets) == 2
    for (first, last), (start, stop) in zip(spans(query_offsets), spans(key_offsets), strict=True):
        scored = visual if alone else visual[(visual >= start) & (visual < stop)] - start
        if first == last or len(scored) == 0:
            result.append(torch.full((len(scored),), -torch.inf, device=keys.device, dtype=torch.float32))
            continue
        places = _range(scored)
        length = torch.linalg.vector_norm(values[start:stop][places].float(), dim=-1)
        length = torch.log(length + 1e-12).T[:, None]  # [G, 1, m]
        k = keys[start:stop].permute(1, 2, 0).float()  # [G, dh, n]
        step = max(1, _BLOCK // (groups * per_group * (stop - start)))
        total: Tensor | None = None  # [m]
        for row in range(first, last, step):
            rows = slice(row, min(row + step, last))
            q = queries[rows].float().mul(scaling).unflatten(1, (groups, per_group)).transpose(0, 1)  # [G, r, H/G, dh]
            logits = torch.bmm(q.flatten(1, 2), k)  # [G, r H/G, n]
            if softcap is not None:
                logits = logits.div_(softcap).tanh_().mul_(softcap)
            hidden = torch.arange(stop - start, device=keys.device) > query_order[rows, None]  # [r, n]
            logits.unflatten(1, (-1, per_group)).masked_fill_(hidden[:, None], -torch.inf)
            if normalize == "visible":  # the query's own key, if no other
                attention = torch.log_softmax(logits, -1)[..., places]  # [G, r H/G, m]
            else:
                attention = logits[..., places]
                normalizer = torch.logsumexp(attention, -1, keepdim=True)
                # A row that attends to none of the keys it is normalized over contributes nothing.
                attention = attention - normalizer.masked_fill_(normalizer == -torch.inf, 0)
            magnitude = attention + length
            if reduce == "max":
                found = magnitude.amax((0, 1))
                total = found if total is None else torch.maximum(total, found)
            else:
                found = torch.logsumexp(magnitude.mul_(power) if power > 1 else magnitude, (0, 1))
                total = found if total is None else torch.logaddexp(total, found)
        assert total is not None
        if reduce != "max":
            total = (total - math.log((last - first) * queries.shape[1])) / power
        result.append(total)
    return result[0] if alone else torch.cat([queries.new_zeros(0, dtype=torch.float32), *result])


def _range(places: Tensor) -> Tensor | slice:
    """Consecutive places as a slice, which does not copy; others unchanged."""
    ends = places[:: max(len(places) - 1, 1)].tolist()
    return slice(ends[0], ends[-1] + 1) if ends[-1] - ends[0] + 1 == len(places) else places
