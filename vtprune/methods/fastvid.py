# SPDX-License-Identifier: Apache-2.0
"""FastVID: salient tokens of every frame, and anchor frames whose cluster centers summarize their segment."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..core.clips import Clip, ClipChoice, ClipMethod, cut_segments, largest
from ..core.density_peaks import density_peaks, group_means, pairwise_distances
from ..core.frame_budget import frame_budgets
from ..core.method import Tap
from ..core.options import Cosine, Positive, Share
from ..core.ragged import first_equal
from ..core.registry import register
from ..core.tokens import Tokens
from ..vision.tower import Vision, layer_tap, projector_tap

if TYPE_CHECKING:
    from ..models.anatomy import Anatomy

_NEIGHBORS = 4


def anchor_counts(length: int, context: int, stride: int) -> list[int]:
    """Centers of each frame of a segment: equally many at every `stride`-th frame counted from the last, else 0.

    Args:
        length: Frames of the segment.
        context: Centers that each frame would have on its own.
        stride: Frames from one anchor to the next.

    Returns:
        list[int]: `(context * length) // anchors` at anchors.
    """
    anchors = set(range(length - 1, -1, -stride))
    return [(context * length) // len(anchors) if t in anchors else 0 for t in range(length)]


@dataclass(frozen=True)
class FramePlan:
    """How many tokens each frame of a clip keeps and merges into.

    Attributes:
        salient: Tokens that each frame keeps unchanged.
        centers: Merged tokens of each frame.
        alone: Whether the centers of a frame summarize that frame only.
    """

    salient: list[int]
    centers: list[int]
    alone: list[bool]


def plan(sizes: Sequence[int], segments: Sequence[int], budget: int, context_share: float, stride: int) -> FramePlan:
    """Divides a budget exactly among the salient tokens and centers of the frames.

    Each frame's equal part of the budget is split by `context_share`; the centers of a segment move to its anchors. The
    first anchors take the remainder of the division; what an anchor cannot hold, and the rest of the budget, goes to
    further salient tokens, equally over frames.

    Args:
        sizes: Tokens of each frame.
        segments: Frames of each segment.
        budget: Tokens that the clip keeps.
        context_share: Share of the budget for centers.
        stride: Frames from one anchor to the next.
    """
    each = budget // len(sizes)
    context = int(each * context_share)
    salient = [min(each - context, n) for n in sizes]
    centers, alone = [], []
    for length in segments:
        counts = anchor_counts(length, context, stride)
        alone += [count == context for count in counts]
        left = context * length - sum(counts)
        for t in [t for t, count in enumerate(counts) if count][:left]:
            counts[t] += 1
        centers += counts
    centers = [min(c, n - s) for c, n, s in zip(centers, sizes, salient, strict=True)]
    room = [n - s - c for n, s, c in zip(sizes, salient, centers, strict=True)]
    further = frame_budgets([1.0] * len(sizes), budget - sum(salient) - sum(centers), room)
    return FramePlan([s + f for s, f in zip(salient, further, strict=True)], centers, alone)


def summarize(x: Tensor, centers: Tensor, members: Tensor, least: float) -> Tensor:
    """Merges tokens into the centers they are most similar to.

    Args:
        x: `[n, D]` float32.
        centers: `[C]` rows of the centers.
        members: `[m]` rows that are merged, with or without the centers; each joins the center with the largest
            cosine, a center itself.
        least: Smallest weight of the center. With `k` members it is `max(least, 1 / (k + 1))`, and the mean of the
            members has the rest.

    Returns:
        Tensor: `[C, D]`.
    """
    unit = normalize(x, dim=-1)
    nearest = first_equal(unit[centers])[(unit[members] @ unit[centers].T).argmax(1)]
    own = members[:, None] == centers
    nearest = torch.where(own.any(1), own.to(torch.int8).argmax(1), nearest)
    means, sizes = group_means(x[members], nearest, len(centers))
    weight = (1 / (sizes.float() + 1)).clamp_min(least)[:, None]
    weight = torch.where(sizes[:, None] > 0, weight, 1.0)
    return weight * x[centers] + (1 - weight) * means


@register("fastvid")
@dataclass
class FastVID(ClipMethod):
    """Keeps, in segments of similar frames, salient tokens, and cluster centers that summarize the others.

    Paper: FastVID (NeurIPS 2025), arXiv 2503.11187. Stage: before the decoder. The clip is cut into segments where
    neighboring frames differ. Of a frame's equal part of the budget, `1 - context_share` goes to the tokens with the
    most attention in the vision tower, unchanged. The others of a segment are merged: every `anchor_stride`-th frame,
    counted from the last, holds density-peak centers (DPC-kNN, 4 neighbors), and every other token of the segment joins
    its most similar center of every anchor, `w * center + (1 - w) * mean`, `w = max(beta, 1 / (members + 1))`. A center
    keeps its own place in the prompt and its position id.

    A picture is a segment of one frame.

    Differences from the release: a frame is compared by the mean of its projected tokens, as in the release's port to
    Qwen2.5-VL, and its tokens are ranked by the mean attention that they receive, or that of the class token. The
    release for LLaVA-OneVision reads SigLIP's pooling head for both, which models of transformers leave out; the port
    ranks by the frame's mean query and skips frames that resemble the next. The count is exact: the remainder of the
    division goes to the first anchors, what an anchor cannot hold to further salient tokens. Clips shorter than
    `segments` frames work. On models with position ids on several axes (M-RoPE) a merged token has the position of its
    center.

    Attributes:
        segments: Minimum number of segments of a clip.
        threshold: Frames whose cosine is below it are in different segments.
        context_share: Share of the budget for centers.
        anchor_stride: Frames from one anchor to the next.
        beta: Smallest weight of a center in its mean.
    """

    differentiable = True
    segments: Positive = 8
    threshold: Cosine = 0.9
    context_share: Share = 0.4
    anchor_stride: Positive = 4
    beta: Share = 0.6

    def taps(self, anatomy: Anatomy) -> Iterable[Tap]:
        return (projector_tap(anatomy, self.name), layer_tap(anatomy, "feature"))

    def attention(self, tokens: Tokens) -> Tensor:
        return Vision(tokens, self.name).importance()

    def choose_clip(self, x: Tensor, clip: Clip, budget: int, attention: Tensor | None) -> ClipChoice:
        assert attention is not None
        means = normalize(clip.frame_means(x), dim=-1)
        segments = cut_segments((means[1:] * means[:-1]).sum(-1), self.segments, self.threshold)
        counts = plan(clip.sizes, segments, budget, self.context_share, self.anchor_stride)
        return self.merge(x, clip, attention, segments, counts)

    def merge(self, x: Tensor, clip: Clip, attention: Tensor, segments: Sequence[int], counts: FramePlan) -> ClipChoice:
        """Picks and merges the tokens of a clip `[n, D]` with given counts; the centers come last in the choice."""
        frames = list(torch.arange(len(x), device=x.device).split(clip.sizes))
        salient = [rows[largest(attention[rows], n)] for rows, n in zip(frames, counts.salient, strict=True)]
        rest = [rows[~torch.isin(rows, taken)] for rows, taken in zip(frames, salient, strict=True)]
        centers, states, start = [], [], 0
        for length in segments:
            segment = torch.cat(rest[start : start + length])
            for t in range(start, start + length):
                if not counts.centers[t]:
                    continue
                peaks = density_peaks(pairwise_distances(x[rest[t]]), counts.centers[t], _NEIGHBORS)
                centers.append(rest[t][peaks])
                members = rest[t] if counts.alone[t] else segment
                states.append(summarize(x, centers[-1], members, self.beta))
            start += length
        kept = torch.cat(salient)
        return ClipChoice(torch.cat([kept, *centers]), torch.cat([x[kept], *states]), attention)
