# SPDX-License-Identifier: Apache-2.0
"""Magnitude of a key-value pair's rank-one update without a query (IWP, arXiv 2604.00757, section 3)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ...core.ragged import group_ids


def query_free_magnitude(
    keys: Tensor,
    values: Tensor,
    offsets: Tensor,
    scaling: float,
    reduce: Literal["mean", "rms", "max"] = "mean",
) -> Tensor:
    """Logarithm of `M_i = reduce_g |phi(k_gi)| |v_gi| / sum_j |phi(k_gj)|`, computed in the log domain.

    `|phi(k)| = exp(scaling |k|^2 / 2)` is the length of a key in the feature space of softmax attention. It is the same
    before and after rotation. The sum over the keys of the group replaces the softmax sum of a query: unnormalized
    lengths differ between heads by factors like e^50, so that a single head would dominate.

    Args:
        keys: `[M, G, dk]` of the visual tokens.
        values: `[M, G, dv]`.
        offsets: `[S + 1]` offsets of the groups.
        scaling: Factor on the dot product.
        reduce: How KV heads are joined: mean, root mean square or maximum.

    Returns:
        Tensor: `[M]` float32, natural logarithm.
    """
    length = keys.float().square().sum(-1) * (scaling / 2)  # [M, G]
    groups = group_ids(offsets, len(keys))
    shape = (len(offsets) - 1, keys.shape[1])
    index = groups[:, None].expand_as(length)
    top = length.new_full(shape, -torch.inf).scatter_reduce(0, index, length, "amax")
    total = length.new_zeros(shape).scatter_add(0, index, torch.exp(length - top[groups]))
    logs = length - top[groups] - total.log()[groups] + torch.log(values.float().norm(dim=-1) + 1e-12)
    if reduce == "max":
        return logs.amax(1)
    power = 2 if reduce == "rms" else 1
    mean = torch.logsumexp(power * logs, 1) - torch.log(torch.tensor(float(keys.shape[1])))
    return mean / power
