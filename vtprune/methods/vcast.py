# SPDX-License-Identifier: Apache-2.0
"""V-CAST: frames at turns of the motion get more tokens, and each frame keeps its unusual ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..core.clips import Clip, ClipChoice, ClipMethod, largest
from ..core.frame_budget import frame_budgets
from ..core.options import AboveZero
from ..core.registry import register


def unit_means(x: Tensor, clip: Clip) -> Tensor:
    """`[T, D]` means over the tokens of each frame of `x` `[n, D]`, divided by their length.

    In float64 where the device has it: the curvature of slow motion is a difference of nearly equal means.
    """
    precise = torch.float32 if x.device.type == "mps" else torch.float64
    return normalize(clip.frame_means(x.to(precise)), dim=-1)


def curvature(means: Tensor) -> Tensor:
    """`[T]` turn of the path of the frame means at each frame, in [0, 2].

    Args:
        means: `[T, D]` frame means of unit length.

    Returns:
        Tensor: 1 minus the cosine of the steps to and from the frame; 1 at both ends and where nothing moves, which
            rounding makes a step of up to 1e-6.
    """
    steps = means.diff(dim=0)
    length = steps.norm(dim=-1, keepdim=True)
    steps = torch.where(length > 1e-6, steps / length, 0.0)
    ends = means.new_ones(min(len(means), 1)), means.new_ones(min(max(len(means) - 1, 0), 1))
    return torch.cat([ends[0], 1 - (steps[:-1] * steps[1:]).sum(-1), ends[1]])


def token_scores(x: Tensor, clip: Clip, means: Tensor) -> Tensor:
    """`[n]` 1 minus the cosine to the frame's mean, plus the token's length scaled to [0, 1] within its frame."""
    scores = []
    for part, mean in zip(x.split(clip.sizes), means, strict=True):
        length = part.norm(dim=-1)
        spread = (length - length.min()) / (length.max() - length.min() + 1e-6)
        scores.append(1 - (normalize(part, dim=-1) * mean.to(part)).sum(-1) + spread)
    return torch.cat(scores)


def most_unusual(scores: Tensor, clip: Clip, counts: Sequence[int]) -> Tensor:
    """Indices of the `counts[t]` largest scores of each frame, ascending."""
    keep, start = [], 0
    for part, count in zip(scores.split(clip.sizes), counts, strict=True):
        keep.append(largest(part, count) + start)
        start += len(part)
    return torch.cat(keep)


@register("vcast")
@dataclass
class VCast(ClipMethod):
    """Gives frames budgets by the curvature of the clip's path, and keeps tokens far from their frame's mean.

    Paper: V-CAST, arXiv 2603.27650. Stage: before the decoder. With `u_t` the normalized mean of a frame's tokens,
    `q_t = 1 - cos(u_t - u_{t-1}, u_{t+1} - u_t)`, 1 at the ends; a frame's share of the budget is `softmax(q / 0.7)`,
    at least one token. A frame keeps the largest `(1 - cos(x, u_t)) + minmax(|x|)`. `q` is high where motion turns; a
    hard cut between still scenes has 1.0, less than the 1.5 of independent noise around it.

    A picture is one frame, which gets the whole budget.

    Differences from the release: the remainder of rounding goes to the frames with the largest fractions, one token
    each; in the release to a single frame. A budget below one token per frame is not raised: frames then have no
    minimum. Clips of one frame are pruned; the release returns them whole.

    Attributes:
        temperature: Temperature of the softmax over frames.
    """

    temperature: AboveZero = 0.7

    def choose_clip(self, x: Tensor, clip: Clip, budget: int, attention: Tensor | None) -> ClipChoice:
        means = unit_means(x, clip)
        weights = torch.softmax(curvature(means).double().cpu() / self.temperature, 0)
        counts = frame_budgets(weights.tolist(), budget, clip.sizes, floor=1)
        scores = token_scores(x, clip, means)
        return ClipChoice(most_unusual(scores, clip, counts), scores=scores)
