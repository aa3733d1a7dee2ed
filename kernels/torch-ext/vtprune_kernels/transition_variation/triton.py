# SPDX-License-Identifier: Apache-2.0
"""Change of tokens by a module, on a GPU: both inputs are read once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import power_of_two


@triton.jit
def _variation(
    before, after, ratio, direction, rows, before_row, before_column, after_row, after_column,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    at = row.to(tl.int64)
    first = tl.zeros([ROWS], tl.float32)
    second = tl.zeros([ROWS], tl.float32)
    product = tl.zeros([ROWS], tl.float32)
    for start in range(0, WIDTH, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = inside[:, None] & (column < WIDTH)[None, :]
        a = tl.load(before + at[:, None] * before_row + column[None, :] * before_column, mask=mask, other=0.0)
        b = tl.load(after + at[:, None] * after_row + column[None, :] * after_column, mask=mask, other=0.0)
        a, b = a.to(tl.float32), b.to(tl.float32)
        first += tl.sum(a * a, 1)
        second += tl.sum(b * b, 1)
        product += tl.sum(a * b, 1)
    first, second = tl.sqrt(first), tl.sqrt(second)
    tl.store(ratio + row, second / first, mask=inside)
    cosine = product / (tl.maximum(first, 1e-8) * tl.maximum(second, 1e-8))
    tl.store(direction + row, 1 - cosine, mask=inside)


def transition_variation(x_in: Tensor, x_out: Tensor) -> tuple[Tensor, Tensor]:
    """See `vtprune_kernels.transition_variation`."""
    shape, width = x_in.shape[:-1], x_in.shape[-1]
    before, after = x_in.reshape(-1, width), x_out.reshape(-1, width)
    ratio, direction = torch.empty(2, len(before), device=x_in.device).unbind()
    if len(before):
        _variation[(-(-len(before) // 4),)](
            before, after, ratio, direction, len(before), *before.stride(), *after.stride(),
            WIDTH=width, BLOCK=min(1024, power_of_two(width)), ROWS=4,
        )  # fmt: skip
    return ratio.view(shape), direction.view(shape)
