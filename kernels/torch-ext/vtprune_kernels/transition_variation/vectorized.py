# SPDX-License-Identifier: Apache-2.0
"""Change of tokens by a module, computed in blocks of rows, without temporaries of the size of the inputs."""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 1 << 17  # elements of a block, small enough to stay in the cache while it is read three times


def transition_variation(x_in: Tensor, x_out: Tensor) -> tuple[Tensor, Tensor]:
    """See `vtprune_kernels.transition_variation`."""
    shape, width = x_in.shape[:-1], max(1, x_in.shape[-1])
    ratio, direction = [], []
    blocks = (x.reshape(-1, x_in.shape[-1]).split(max(1, _BLOCK // width)) for x in (x_in, x_out))
    for before, after in zip(*blocks, strict=True):
        a, b = before.float(), after.float()
        first, second = torch.linalg.vector_norm(a, dim=-1), torch.linalg.vector_norm(b, dim=-1)
        product = torch.linalg.vecdot(a, b)
        ratio.append(second / first)
        direction.append(1 - product / (first.clamp_min(1e-8) * second.clamp_min(1e-8)))
    return torch.cat(ratio).view(shape), torch.cat(direction).view(shape)
