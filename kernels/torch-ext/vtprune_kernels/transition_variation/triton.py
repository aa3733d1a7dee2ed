# SPDX-License-Identifier: Apache-2.0
"""Change of tokens by a module on a GPU, in one pass over input and output."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import power_of_two


@triton.jit
def _variation(
    x_ptr, y_ptr, ratio_ptr, direction_ptr, n_rows, stride_xm, stride_xd, stride_ym, stride_yd,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < n_rows
    offs_m = rows.to(tl.int64)
    x_norm = tl.zeros([BLOCK_M], tl.float32)
    y_norm = tl.zeros([BLOCK_M], tl.float32)
    dot = tl.zeros([BLOCK_M], tl.float32)
    for start_d in range(0, D, BLOCK_D):
        offs_d = start_d + tl.arange(0, BLOCK_D)
        mask = row_mask[:, None] & (offs_d < D)[None, :]
        x = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_d[None, :] * stride_xd, mask=mask, other=0.0)
        y = tl.load(y_ptr + offs_m[:, None] * stride_ym + offs_d[None, :] * stride_yd, mask=mask, other=0.0)
        x, y = x.to(tl.float32), y.to(tl.float32)
        x_norm += tl.sum(x * x, 1)
        y_norm += tl.sum(y * y, 1)
        dot += tl.sum(x * y, 1)
    x_norm, y_norm = tl.sqrt(x_norm), tl.sqrt(y_norm)
    tl.store(ratio_ptr + rows, y_norm / x_norm, mask=row_mask)
    cosine = dot / (tl.maximum(x_norm, 1e-8) * tl.maximum(y_norm, 1e-8))
    tl.store(direction_ptr + rows, 1 - cosine, mask=row_mask)


def transition_variation(x_in: Tensor, x_out: Tensor) -> tuple[Tensor, Tensor]:
    """See `vtprune_kernels.transition_variation`."""
    shape, width = x_in.shape[:-1], x_in.shape[-1]
    before, after = x_in.reshape(-1, width), x_out.reshape(-1, width)
    ratio, direction = torch.empty(2, len(before), device=x_in.device, dtype=torch.float32).unbind()
    if len(before):
        _variation[(-(-len(before) // 4),)](
            before, after, ratio, direction, len(before), *before.stride(), *after.stride(),
            D=width, BLOCK_D=min(1024, power_of_two(width)), BLOCK_M=4,
        )  # fmt: skip
    return ratio.view(shape), direction.view(shape)
