# SPDX-License-Identifier: Apache-2.0
"""Importance map of VFlowOpt (arXiv 2508.05211): attention from the most attended tokens, and patch entropy."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...core.ragged import group_ids
from ...vision.tower import Attention, Vision, pixel_crops


def selected_rows(received: Tensor, part: Tensor, t: float) -> Tensor:
    """Tokens that receive more than `t` times the mean attention of their crop.

    Args:
        received: `[N]` mean attention received.
        part: `[N]` int64 crop of each token, -1 for tokens that do not count.
        t: Threshold factor.

    Returns:
        Tensor: `[N]` bool; all tokens of a crop where none reaches the threshold (the release averages nothing there).
    """
    real = part >= 0
    parts = int(part.max()) + 1
    count = torch.bincount(part[real], minlength=parts)
    mean = received.new_zeros(parts).index_add_(0, part[real], received[real]) / count.clamp_min(1)
    chosen = real & (received > t * mean[part])
    none = torch.bincount(part[chosen], minlength=parts) == 0
    return chosen | (real & none[part])


def patch_entropy(pixels: Tensor, patch: int) -> Tensor:
    """Entropy in bits of the gray levels of every patch, as released.

    Gray levels are the normalized pixels times 255, cut to whole numbers that wrap around at 256.

    Args:
        pixels: `[n, 3, H, W]`.
        patch: Side of a patch.

    Returns:
        Tensor: `[n, H / patch * W / patch]` float32.
    """
    levels = (pixels.float() * 255).trunc().long() % 256
    gray = (levels.float() * 0.3333).sum(1).round().long().clamp(0, 255)  # [n, H, W]
    cells = gray.unfold(1, patch, patch).unfold(2, patch, patch).flatten(3).flatten(1, 2)  # [n, P, patch * patch]
    share = torch.zeros(*cells.shape[:2], 256, device=pixels.device, dtype=torch.float32)
    share.scatter_add_(2, cells, torch.full(cells.shape, 1 / cells.shape[2], device=pixels.device, dtype=torch.float32))
    return -(share * torch.log2(share + 1e-10)).sum(2)


def attention_map(attention: Attention, threshold: float) -> Tensor:
    """`[B, N]` mean attention that each token of a vision layer receives from the selected rows of its crop."""
    batch, length = attention.query.shape[0], attention.query.shape[2]
    device = attention.query.device
    if attention.offsets is None:
        part = torch.arange(batch, device=device)[:, None].repeat(1, length)
    else:
        part = group_ids(attention.offsets.to(device))[None]
    part[:, : attention.prefix] = -1
    if attention.valid is not None:
        part = torch.where(attention.valid, part, -1)
    rows = selected_rows(attention.received().flatten(), part.flatten(), threshold)
    return attention.received(rows.view(batch, length))


def importance_map(vision: Vision, threshold: float, alpha: float) -> Tensor:
    """`[M]` importance of the visual tokens, 1 for those that show no patch (newlines).

    Args:
        vision: The vision side of the prefill.
        threshold: Factor on the mean for a row to be selected.
        alpha: Weight of the softmax of the patches' entropies.

    Raises:
        MethodError: `alpha` is not 0, and the pixels are not square crops.
    """
    table = vision.tokens_of_patches(lambda attention: attention_map(attention, threshold))
    if alpha:
        entropies = [
            torch.softmax(patch_entropy(pixels, pixels.shape[-1] // math.isqrt(x.shape[1])), 1)
            for pixels, (x, _, _) in zip(pixel_crops(vision), vision.calls, strict=True)
        ]
        table = table + alpha * vision.carry(entropies)
    return table.nan_to_num(1.0)
