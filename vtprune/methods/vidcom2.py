# SPDX-License-Identifier: Apache-2.0
"""VidCom2: distinct frames get more tokens, and each frame keeps its distinct tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..core.clips import Clip, ClipChoice, ClipMethod
from ..core.ragged import settle_ties
from ..core.registry import register

_WIDTHS = (1 / 8, 1 / 4, 1 / 2, 1, 2)
_TEMPERATURE = 0.01


def calm_channels(x: Tensor) -> Tensor:
    """`[D // 2]` channels with the lowest variance over all tokens, ascending; ties go to the smaller index."""
    return x.var(0, unbiased=False).sort(stable=True).indices[: x.shape[1] // 2].sort().values


def kernel_similarity(x: Tensor, center: Tensor) -> Tensor:
    """Sum of Gaussian kernels of several widths between rows `[n, C]` and a center that broadcasts to them: `[n]`."""
    squared = (x - center).square().sum(-1)
    return torch.stack([torch.exp(-squared / (2 * width)) for width in _WIDTHS]).sum(0)


def similarities(x: Tensor, clip: Clip) -> tuple[Tensor, Tensor]:
    """Similarity `[n]` of every token to the center of the clip, and `[n]` to that of its frame."""
    unit = normalize(x[:, calm_channels(x)], dim=-1)
    centers = clip.frame_means(unit)[clip.frame.to(x.device)]
    return kernel_similarity(unit, unit.mean(0)), kernel_similarity(unit, centers)


def frame_shares(to_clip: Tensor, clip: Clip, share: float) -> Tensor:
    """`[T]` share of each frame's tokens to keep, at most 1; more for frames that differ from the clip."""
    distinct = -clip.frame_means(to_clip[:, None])[:, 0]
    distinct = torch.softmax(distinct / _TEMPERATURE, 0)
    return (share * (1 + distinct - 1 / clip.frames)).clamp_max(1)


def most_distinct(scores: Tensor, clip: Clip, counts: list[int], budget: int) -> Tensor:
    """Tokens with the smallest scores of each frame, corrected over the whole clip to exactly `budget` tokens.

    Args:
        scores: `[n]` similarities; smaller is more distinct.
        clip: Frames of the tokens.
        counts: Target number of tokens of each frame.
        budget: Exact number of tokens of the clip: of too many the largest scores are dropped, of too few the smallest
            remaining ones are added; ties go to the smaller index.

    Returns:
        Tensor: `[budget]` token indices, ascending.
    """
    keep = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    scores = -settle_ties(-scores)
    for part, marks, count in zip(scores.split(clip.sizes), keep.split(clip.sizes), counts, strict=True):
        marks[part.sort(stable=True).indices[:count]] = True
    by_score = scores.sort(stable=True).indices
    kept_first = by_score[(~keep[by_score]).sort(stable=True).indices]
    return kept_first[:budget].sort().values


@register("vidcom2")
@dataclass
class VidCom2(ClipMethod):
    """Keeps tokens that differ from the mean of the clip and of their frame, more of them in distinct frames.

    Paper: VidCom2, arXiv 2505.14454 (EMNLP 2025). Stage: before the decoder. On the half of the channels with the
    lowest variance, rows normalized: similarity `v` to the mean of the clip and `f` to the mean of the frame, each a
    sum of five Gaussian kernels. Frame `t` keeps the share `min(1, r (1 + s_t - 1/T))`, `s = softmax(-mean v / 0.01)`,
    at least one token, by the smallest `v + f`. The order of frames does not matter.

    A picture is a clip of one frame; both means are the same.

    Differences from the release: the count is exact, as in vLLM's version: what rounding and the limit of 1 add or
    remove is corrected over the whole clip by `v + f`, which may take the last token of a frame. Every prompt of a
    batch is pruned; newlines are not candidates.
    """

    def choose_clip(self, x: Tensor, clip: Clip, budget: int, attention: Tensor | None) -> ClipChoice:
        to_clip, to_frame = similarities(x, clip)
        shares = frame_shares(to_clip, clip, budget / len(x))
        counts = [max(1, round(s * n)) for s, n in zip(shares.tolist(), clip.sizes, strict=True)]
        scores = to_clip + to_frame
        return ClipChoice(most_distinct(scores, clip, counts, budget), scores=-scores)
