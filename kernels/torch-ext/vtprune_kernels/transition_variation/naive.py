# SPDX-License-Identifier: Apache-2.0
"""Change of tokens by a module: the specification."""

from __future__ import annotations

import torch
from torch import Tensor


def transition_variation(x_in: Tensor, x_out: Tensor) -> tuple[Tensor, Tensor]:
    """See `vtprune_kernels.transition_variation`."""
    before, after = x_in.float(), x_out.float()
    ratio = after.norm(dim=-1) / before.norm(dim=-1)
    return ratio, 1 - torch.cosine_similarity(after, before, dim=-1, eps=1e-8)
