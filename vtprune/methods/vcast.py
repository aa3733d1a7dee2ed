# SPDX-License-Identifier: Apache-2.0
"""V-CAST: frames where the motion turns get more tokens, and in a frame the unusual ones stay."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..core.clips import Clip, ClipChoice, ClipMethod, largest
from ..core.frame_budget import frame_budgets
from ..core.options import AboveZero
from ..core.registry import register


def curvature(means: Tensor) -> Tensor:
    """How much the path of the frame means turns at each frame: `[T]` in [0, 2].

    Args:
        means: `[T, D]` frame means of unit length.

    Returns:
        Tensor: 1 minus the cosine of the steps to and from the frame; 1 at both ends and where nothing moves.
    """
    steps = means.diff(dim=0)
    steps = steps / steps.norm(dim=-1, keepdim=True).clamp_min(1e-6)
    ends = means.new_ones(min(len(means), 1)), means.new_ones(min(max(len(means) - 1, 0), 1))
    return torch.cat([ends[0], 1 - (steps[:-1] * steps[1:]).sum(-1), ends[1]])


def token_scores(x: Tensor, clip: Clip, means: Tensor) -> Tensor:
    """`[n]` 1 minus the cosine to the frame's mean, plus the token's length scaled to [0, 1] within its frame."""
    scores = []
    for part, mean in zip(x.split(clip.sizes), means, strict=True):
        length = part.norm(dim=-1)
        spread = (length - length.min()) / (length.max() - length.min() + 1e-6)
        scores.append(1 - normalize(part, dim=-1) @ mean + spread)
    return torch.cat(scores)


@register("vcast")
@dataclass
class VCast(ClipMethod):
    """Frame budgets by the curvature of the clip's path, then tokens far from the mean of their frame.

    Paper: V-CAST, arXiv 2603.27650. Stage: before the decoder. With `u_t` the normalized mean of a frame's tokens,
    `q_t = 1 - cos(u_t - u_{t-1}, u_{t+1} - u_t)`, 1 at the ends; a frame's share of the budget is `softmax(q / 0.7)`,
    one token at least. In a frame the largest `(1 - cos(x, u_t)) + minmax(|x|)` stay. `q` rewards turns in motion; a
    hard cut between still scenes has 1.0, less than the 1.5 of independent noise around it.

    On a picture there is one frame, which gets the whole budget.

    Differences from the release: leftovers of rounding go to the frames with the largest fractions, one each; in the
    release all of them go to one frame. A budget below one token a frame is not raised: then frames have no floor.
    Clips of one frame are pruned; the release returns them whole.

    Attributes:
        temperature: Of the softmax over frames.
    """

    temperature: AboveZero = 0.7

    def choose_clip(self, x: Tensor, clip: Clip, budget: int, attention: Tensor | None) -> ClipChoice:
        means = normalize(clip.frame_means(x), dim=-1)
        weights = torch.softmax(curvature(means) / self.temperature, 0)
        counts = frame_budgets(weights.tolist(), budget, clip.sizes, floor=1)
        scores = token_scores(x, clip, means)
        keep, start = [], 0
        for part, count in zip(scores.split(clip.sizes), counts, strict=True):
            keep.append(largest(part, count) + start)
            start += len(part)
        return ClipChoice(torch.cat(keep), scores=scores)
