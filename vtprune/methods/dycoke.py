# SPDX-License-Identifier: Apache-2.0
"""DyCoke: keeps every fourth frame whole, and in the others the tokens that changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..core.clips import Clip, ClipChoice, ClipMethod, largest, similarity_to
from ..core.frame_budget import frame_budgets
from ..core.registry import register

_GROUP = 4  # frames
NOT_COMPARED = 2.0  # above every cosine


def similarity(x: Tensor, clip: Clip) -> Tensor:
    """Cosine `[n]` of every token with the one at the same place in its reference frame.

    In a group of four, the reference of frames 1 and 3 is the unpruned frame before, that of frame 2 is frame 0. Tokens
    of frame 0 get 2, places that the reference frame lacks -2.
    """
    reference = [(-1, t - 1, t - 2, t - 1)[t % _GROUP] for t in range(clip.frames)]
    first = (clip.frame % _GROUP == 0).to(x.device)
    return similarity_to(x, clip.at_same_place(reference), missing=-2.0).masked_fill(first, NOT_COMPARED)


@register("dycoke")
@dataclass
class DyCoke(ClipMethod):
    """Keeps the first of every four frames whole, and thins the others by similarity to a neighboring frame.

    Paper: DyCoke, arXiv 2411.15024 (CVPR 2025), the temporal part. Stage: before the decoder. Frames 1 and 3 of a group
    keep the places least similar to the frame before, frame 2 those least similar to frame 0; nothing is averaged. What
    the whole frames leave of the budget is divided equally among the thinned ones. The published ratio is
    `(1 + 3 * 0.3) / 4 = 0.475`.

    Differences from the release: the last group is thinned too; no frame of an odd clip is lost; clips of four frames
    or fewer work; tokens stay in the order of the prompt; the count is exact. A budget below the whole frames, a
    quarter of the clip, raises an error. The paper's cache pruning during decoding is not implemented.
    """

    needs_frames: ClassVar[bool] = True
    whole: ClassVar[str] = "every fourth frame"

    def least_budget(self, sizes: Sequence[int]) -> int:
        return sum(sizes[::_GROUP])

    def choose_clip(self, x: Tensor, clip: Clip, budget: int, attention: Tensor | None) -> ClipChoice:
        thinned = [0 if t % _GROUP == 0 else n for t, n in enumerate(clip.sizes)]
        extra = frame_budgets([float(n > 0) for n in thinned], budget - self.least_budget(clip.sizes), thinned)
        scores, keep, start = -similarity(x, clip), [], 0
        for t, part in enumerate(scores.split(clip.sizes)):
            count = len(part) if t % _GROUP == 0 else extra[t]
            keep.append(largest(part, count) + start)
            start += len(part)
        return ClipChoice(torch.cat(keep), scores=scores)
