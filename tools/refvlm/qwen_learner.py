# SPDX-License-Identifier: Apache-2.0
"""Training of the earlier Qwen2.5-VL: pictures of several sizes, window attention and M-RoPE positions."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tools.refvlm import data, model, qwen
from tools.refvlm.learner import Learner
from tools.refvlm.qwen2_5_vl.learner import attend
from vtprune.refvlm.qwen import CELL, MERGE_SIZE, PATCH_SIZE

TEMPORAL = 2  # a still picture is two equal frames


def flatten_patches(images: torch.Tensor) -> torch.Tensor:
    """Pixels in the layout of Qwen's image processor: patch by patch, the patches of one visual token adjacent.

    Args:
        images: float32 `[B, 3, H, W]`, `H` and `W` multiples of `CELL`.

    Returns:
        float32 `[B * H/6 * W/6, 3 * 2 * 6 * 6]`.
    """
    count, channels, height, width = images.shape
    rows, columns = height // CELL, width // CELL
    # [B, C, rows, m, p, columns, m, p] -> [B, rows, columns, m, m, C, p, p]
    cut = images.view(count, channels, rows, MERGE_SIZE, PATCH_SIZE, columns, MERGE_SIZE, PATCH_SIZE)
    cut = cut.permute(0, 2, 5, 3, 6, 1, 4, 7)
    both = cut.unsqueeze(6).expand(*cut.shape[:6], TEMPORAL, *cut.shape[6:])
    return both.reshape(count * rows * columns * MERGE_SIZE**2, -1)


class QwenLearner(Learner):
    """The losses of `Learner` for the Qwen2.5-VL, which has no class token."""

    KNOWING = 0
    LOOK, ANSWER, RATE = 600, 400, 1.5e-3
    # Half of the steps use the scenes' own size, the others sizes around it.
    SIZES = (
        *[(144, 144)] * 8,
        *((108, 108), (108, 144), (144, 108), (132, 132)),
        *((120, 168), (168, 120), (96, 192), (192, 96)),
    )

    def __init__(self, vlm: nn.Module):
        super().__init__(vlm)
        vision: Any = vlm.model.visual
        for block in vision.blocks:
            block.attn.forward = MethodType(attend, block.attn)

    def processor(self) -> Any:
        return qwen.processor(model.tokenizer())

    def see(self, batch: data.Batch) -> tuple[torch.Tensor, torch.Tensor]:
        images = data.pixels(batch.images)
        count, _, height, width = images.shape
        grid = torch.tensor([[1, height // PATCH_SIZE, width // PATCH_SIZE]], device=images.device).expand(count, -1)
        seen = self.vlm.model.visual(flatten_patches(images), grid_thw=grid).pooler_output
        return seen.unflatten(0, (count, -1)), seen.new_zeros(())

    def positions(self, batch: data.Batch, prefix: int) -> torch.Tensor:
        """Position ids `[3, B, prefix + TEXT]` of time, row and column."""
        rows, columns = (side // CELL for side in batch.images.shape[1:3])
        device = batch.tokens.device
        cells = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).to(device)
        before = torch.cat((torch.zeros(1, 3), F.pad(cells, (1, 0)) + 1)).long().to(device)  # <bos> and the picture
        after = 1 + max(rows, columns) + batch.positions
        count = len(batch.tokens)
        return torch.cat((before.T[:, None].expand(-1, count, -1), after.expand(3, -1, -1)), dim=2)
