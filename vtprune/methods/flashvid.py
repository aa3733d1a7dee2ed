# SPDX-License-Identifier: Apache-2.0
"""FlashVID: attended, diverse tokens of every frame; the others are merged along trees over time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..core.clips import Clip, ClipChoice, TwoCuts, cut_segments
from ..core.density_peaks import density_peaks, group_means, group_sums, pairwise_distances
from ..core.frame_budget import frame_budgets
from ..core.method import Tap
from ..core.options import Cosine, Positive, Share
from ..core.ragged import TIE, first_equal, pairwise_cosines
from ..core.registry import register
from ..core.tokens import Tokens
from ..vision.tower import Vision, layer_tap, projector_tap

if TYPE_CHECKING:
    from ..models.anatomy import Anatomy

_NEIGHBORS = 7


def diverse(x: Tensor, weight: Tensor, count: int) -> Tensor:
    """Picks tokens with large weights that are far from each other.

    With `M[i, j] = (1 - cos(x_i, x_j)) * weight_j`, the first pick is the column with the largest second-smallest
    value, every further one the largest minimum over the rows picked; ties go to the smaller number.

    Args:
        x: `[n, D]` float32 tokens of a frame.
        weight: `[n]`, not negative.
        count: Picks, at most `n`.

    Returns:
        Tensor: `[count]`, ascending.
    """
    away = (1 - pairwise_cosines(x)) * weight
    if count == 0 or len(x) == 1:
        return torch.arange(count, device=x.device)
    picks = [_first_largest(away.topk(2, dim=0, largest=False).values[1])]
    nearest = away[picks[0]].clone()
    for _ in range(count - 1):
        nearest[picks[-1]] = -torch.inf  # with weight 0 all distances are 0, so a picked token must be excluded
        picks.append(_first_largest(nearest))
        nearest = torch.minimum(nearest, away[picks[-1]])
    return torch.stack(picks).sort().values


def _first_largest(scores: Tensor) -> Tensor:
    """Index of the largest score, which is not negative; of those that tie with it the first."""
    best = scores.amax()
    return (scores >= best - TIE * best).to(torch.int8).argmax()  # argmax returns the first of equals


def event_weights(x: Tensor, means: Tensor) -> Tensor:
    """`[n]` mean inner product of each token `[n, D]` with the frame means `[L, D]` of its segment, clamped at 0."""
    return (x @ means.mean(0)).clamp_min(0)


def tree_links(x: Tensor, frames: Sequence[Tensor], threshold: float, most: int) -> Tensor:
    """For every token of a segment, the token of the previous frame that it is merged into, or -1.

    Args:
        x: `[n, D]` float32 tokens of the clip.
        frames: For each frame of the segment, its tokens that take part.
        threshold: Cosine above which a token is merged into its most similar one.
        most: Largest number of merges; the threshold rises to the `most`-th largest cosine where there would be more.

    Returns:
        Tensor: `[n]` int64.
    """
    links = torch.full((len(x),), -1, device=x.device)
    best, into, rows = [], [], []
    for before, here in zip(frames, frames[1:], strict=False):
        if len(before) and len(here):
            unit = normalize(x[before], dim=-1)
            similarity, nearest = (normalize(x[here], dim=-1) @ unit.T).max(1)
            best.append(similarity)
            into.append(before[first_equal(unit)[nearest]])
            rows.append(here)
    if best:
        similarity = torch.cat(best)
        merged = similarity > threshold
        if int(merged.sum()) > most:
            merged = similarity > (similarity.sort(descending=True).values[most - 1] + TIE if most else torch.inf)
        links[torch.cat(rows)[merged]] = torch.cat(into)[merged]
    return links


def tree_means(x: Tensor, links: Tensor, clip: Clip) -> Tensor:
    """`[n, D]` mean of every token `[n, D]` and all its descendants in the tree."""
    # Sums of differences from the token itself: the mean of equal tokens is exactly that token.
    total, members = torch.zeros_like(x), torch.ones(len(x), 1, device=x.device, dtype=torch.float32)
    for rows in reversed(torch.arange(len(x), device=x.device).split(clip.sizes)):
        rows = rows[links[rows] >= 0]
        if len(rows):
            parents, place = torch.unique(links[rows], return_inverse=True)
            away = total[rows] + members[rows] * (x[rows] - x[links[rows]])
            sums, _ = group_sums(torch.cat([away, members[rows]], 1), place, len(parents))
            total[parents] += sums[:, :-1]
            members[parents] += sums[:, -1:]
    return x + total / members


def cluster(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Density-peak centers `[count]` of `x` `[n, D]`, ascending, and the means `[count, D]` of their clusters."""
    if count == 0:
        return torch.empty(0, dtype=torch.long, device=x.device), x[:0]
    distances = pairwise_distances(x)
    centers = density_peaks(distances, count, min(_NEIGHBORS, count) if count > 1 else _NEIGHBORS)
    nearest = distances[:, centers].argmin(1)
    nearest[centers] = torch.arange(count, device=x.device)
    return centers, group_means(x, nearest, count)[0]


@register("flashvid")
@dataclass
class FlashVID(TwoCuts):
    """Picks tokens of every frame by attention and diversity, and merges the others along trees over time.

    Paper: FlashVID (ICLR 2026), arXiv 2602.08024. Stage: before the decoder and, with `layer`, inside it. The clip is
    cut into segments where the means of neighboring frames differ. Of a frame's budget the share `selected` goes to
    tokens picked one by one, far from those before, weighted by attention in the vision tower and by closeness to the
    segment's frames. In a segment every other token is merged into the most similar one of the previous frame, if the
    cosine is above `temporal`. This makes trees, whose roots become the mean of all their members, and are clustered
    frame by frame (DPC-kNN, at most 7 neighbors) into what is left of the budget. A root keeps its place in the prompt
    and its position id.

    A picture is a segment of one frame: tokens are picked and clustered.

    Differences from the release: a tree's sum is divided by all its members (there by its direct children plus one, so
    that static content gets too large a norm); picked tokens are not picked or clustered again; segments are not empty.
    The count is exact: equal budgets per frame, clusters by largest remainder. The second cut is off by default;
    its published shares are 0.125 before the decoder and 0.0375 after it. Attention is the mean received, or that of
    the class token. On models with position ids on several axes (M-RoPE) a merged token has the position of its root.

    Attributes:
        selected: Share of a frame's budget that is picked.
        temporal: Cosine above which a token is merged into one of the previous frame.
        threshold: Frames whose cosine is below it are in different segments.
        segments: Minimum number of segments of a clip.
        events: Whether weights include closeness to the segment's frames.
        layer: Decoder layer of the second cut, published: 20 of 28; at most the last one. None for one cut.
    """

    differentiable = True
    shares: ClassVar[tuple[float, float]] = (0.125, 0.0375)

    selected: Share = 0.7
    temporal: Cosine = 0.8
    threshold: Cosine = 0.9
    segments: Positive = 8
    events: bool = True

    def taps(self, anatomy: Anatomy) -> Iterable[Tap]:
        return (projector_tap(anatomy, self.name), layer_tap(anatomy, "last"))

    def attention(self, tokens: Tokens) -> Tensor:
        return Vision(tokens, self.name).importance().clamp_min(0)  # it is a factor, and wrappers may make it negative

    def choose_clip(self, x: Tensor, clip: Clip, budget: int, attention: Tensor | None) -> ClipChoice:
        assert attention is not None
        means = clip.frame_means(x)
        segments = cut_segments(torch.cosine_similarity(means[1:], means[:-1]), self.segments, self.threshold)
        budgets = frame_budgets([1.0] * clip.frames, budget, clip.sizes)
        picked = self.pick(x, clip, attention, segments, [math.ceil(self.selected * n) for n in budgets])
        links = self.links(x, clip, picked, segments, budgets)
        counts, start = [], 0
        for length in segments:
            here = range(start, start + length)
            roots = [len(self._roots(clip, picked, links, t)) for t in here]
            total = sum(budgets[t] - len(picked[t]) for t in here)
            counts += frame_budgets([float(n) for n in roots], total, roots)
            start += length
        return self.merge(x, clip, attention, picked, links, counts)

    def pick(
        self, x: Tensor, clip: Clip, attention: Tensor, segments: Sequence[int], counts: Sequence[int]
    ) -> list[Tensor]:
        """For each frame the tokens `[counts[t]]` picked by attention and diversity, as indices in the clip."""
        means, start, out = clip.frame_means(x), 0, []
        of_frame = list(torch.arange(len(x), device=x.device).split(clip.sizes))
        for length in segments:
            for t in range(start, start + length):
                rows = of_frame[t]
                weight = attention[rows]
                if self.events:
                    weight = weight * event_weights(x[rows], means[start : start + length])
                out.append(rows[diverse(x[rows], weight, counts[t])])
            start += length
        return out

    def links(
        self, x: Tensor, clip: Clip, picked: Sequence[Tensor], segments: Sequence[int], budgets: Sequence[int]
    ) -> Tensor:
        """`[n]` token of the previous frame that each token is merged into, or -1."""
        links, start = torch.full((len(x),), -1, device=x.device), 0
        rest = self._rest(clip, picked)
        for length in segments:
            here = slice(start, start + length)
            most = sum(clip.sizes[here]) - sum(budgets[here])
            links = torch.maximum(links, tree_links(x, rest[here], self.temporal, most))
            start += length
        return links

    def merge(
        self, x: Tensor, clip: Clip, attention: Tensor, picked: Sequence[Tensor], links: Tensor, counts: Sequence[int]
    ) -> ClipChoice:
        """Merges the trees of a clip and clusters their roots into `counts[t]` tokens of each frame."""
        trees = tree_means(x, links, clip)
        keep, states = [torch.cat(list(picked))], [x[torch.cat(list(picked))]]
        for t, count in enumerate(counts):
            roots = self._roots(clip, picked, links, t)
            if count == len(roots):
                keep.append(roots)
                states.append(trees[roots])
                continue
            centers, merged = cluster(trees[roots], count)
            keep.append(roots[centers])
            states.append(merged)
        return ClipChoice(torch.cat(keep), torch.cat(states), attention)

    def _rest(self, clip: Clip, picked: Sequence[Tensor]) -> list[Tensor]:
        """For each frame the tokens that were not picked."""
        of_frame = torch.arange(len(clip.frame), device=picked[0].device).split(clip.sizes)
        return [rows[~torch.isin(rows, taken)] for rows, taken in zip(of_frame, picked, strict=True)]

    def _roots(self, clip: Clip, picked: Sequence[Tensor], links: Tensor, frame: int) -> Tensor:
        """The tokens of a frame that were neither picked nor merged."""
        start = sum(clip.sizes[:frame])
        rows = torch.arange(start, start + clip.sizes[frame], device=links.device)
        return rows[~torch.isin(rows, picked[frame]) & (links[rows] < 0)]
