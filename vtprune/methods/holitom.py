# SPDX-License-Identifier: Apache-2.0
"""HoliTom: static places of a clip are averaged over time, tokens of the others are picked by attention."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..core.clips import Clip, ClipChoice, TwoCuts, largest, similarity_to
from ..core.density_peaks import density_peaks, group_means, pairwise_distances
from ..core.frame_budget import frame_budgets
from ..core.method import Choice, Tap
from ..core.options import Cosine, Positive, Share
from ..core.ragged import first_equal
from ..core.registry import register
from ..core.tokens import Tokens
from ..vision.tower import Vision, layer_tap, projector_tap

if TYPE_CHECKING:
    from ..models.anatomy import Anatomy

LONGEST = 1024  # frames of a window, as released


def next_similarity(x: Tensor, clip: Clip) -> Tensor:
    """`[T - 1, Q]` cosine of each place between a frame and the next, on the CPU; -2 where either frame lacks it."""
    after = clip.at_same_place([*range(1, clip.frames), -1])
    similarity = torch.full((clip.frames, clip.table.shape[1]), -2.0, dtype=torch.float32)
    similarity[clip.frame, clip.place] = similarity_to(x, after, missing=-2.0).cpu()
    return similarity[:-1]


def static_runs(similarity: Tensor, threshold: float) -> Tensor:
    """`[T, Q]` number of consecutive static steps of each place up to each frame."""
    static = similarity > threshold
    runs = torch.zeros(len(static) + 1, static.shape[1], dtype=torch.long)
    for t, row in enumerate(static):
        runs[t + 1] = torch.where(row, runs[t] + 1, 0)
    return runs


def windows(runs: Tensor, longest: int = LONGEST) -> list[tuple[int, int]]:
    """Cuts a clip into windows such that averaging the static places of each saves the most tokens.

    Args:
        runs: `[T, Q]` of `static_runs`. A window of `L` frames saves `L - 1` tokens for every place static throughout.
        longest: Most frames of a window.

    Returns:
        list: First and last frame of each window. Where several windows save equally much, the shortest is taken.
    """
    frames, places = runs.shape
    best, length = [0], []
    for end in range(frames):
        steps = torch.arange(end + 1)
        static = places - torch.bincount(runs[end], minlength=end + 1)[: end + 1].cumsum(0)  # places with longer runs
        static = torch.cat([torch.tensor([places]), static[:-1]])  # runs of at least that many steps
        total = (torch.tensor(best[::-1]) + static * steps)[:longest]  # and the best cut of the frames before
        length.append(int(total.argmax()) + 1)
        best.append(int(total.max()))
    out, end = [], frames - 1
    while end >= 0:
        out.append((end - length[end] + 1, end))
        end -= length[end]
    return out[::-1]


@dataclass
class StaticPlaces:
    """Static and moving tokens of a clip.

    Attributes:
        windows: First and last frame of each window.
        static: For each window, `[L, n]` tokens of the places that are static in it, frame by frame; `[L, 0]` in
            windows of one frame.
        moving: For each frame, `[n]` its other tokens.
    """

    windows: list[tuple[int, int]]
    static: list[Tensor]
    moving: list[Tensor]

    @property
    def saved(self) -> int:
        """Tokens saved if every static place becomes one token per window."""
        return sum(max(len(s) - 1, 0) * s.shape[1] for s in self.static)


def split(
    similarity: Tensor, clip: Clip, threshold: float, most: int | None = None, longest: int = LONGEST
) -> StaticPlaces:
    """Splits the tokens of a clip into static and moving ones.

    Args:
        similarity: `[T - 1, Q]` of `next_similarity`.
        clip: Frames and places.
        threshold: Cosine above which a place is static from one frame to the next.
        most: Most tokens to save; where it would be more, the least similar places count as moving.
        longest: Most frames of a window.
    """
    runs = static_runs(similarity, threshold)
    found = windows(runs, longest)
    marks = [
        runs[last] >= last - first if last > first else torch.zeros(runs.shape[1], dtype=torch.bool)
        for first, last in found
    ]
    saved = sum(int(m.sum()) * (last - first) for m, (first, last) in zip(marks, found, strict=True))
    if most is not None and saved > most:
        candidates = [
            (float(similarity[first:last, place].min()), number, place)
            for number, (first, last) in enumerate(found)
            for place in marks[number].nonzero()[:, 0].tolist()
        ]
        for _, number, place in sorted(candidates):
            if saved <= most:
                break
            marks[number][place] = False
            saved -= found[number][1] - found[number][0]
    static = [clip.table[first : last + 1, mark] for (first, last), mark in zip(found, marks, strict=True)]
    moving = []
    for (first, last), mark in zip(found, marks, strict=True):
        for t in range(first, last + 1):
            row = clip.table[t, ~mark]
            moving.append(row[row >= 0])
    return StaticPlaces(found, static, [rows.sort().values for rows in moving])


def merge(x: Tensor, count: int, neighbors: int, beta: float, plain: bool) -> tuple[Tensor, Tensor]:
    """Clusters rows around density peaks and merges each cluster into its center.

    Args:
        x: `[n, D]` float32.
        count: Centers.
        neighbors: Neighbors for the density, at most the number of centers; with a single center, for which that would
            make all densities equal, as given.
        beta: Weight of a center; the mean of its other members has `1 - beta`. A center alone is unchanged.
        plain: Use the mean of center and members instead.

    Returns:
        tuple: `[count]` rows of the centers, ascending, and `[count, D]`.
    """
    if count == 0:
        return torch.empty(0, dtype=torch.long, device=x.device), x[:0]
    distances = pairwise_distances(x)
    centers = density_peaks(distances, count, min(neighbors, count) if count > 1 else neighbors)
    others = torch.ones(len(x), dtype=torch.bool, device=x.device).index_fill(0, centers, False).nonzero()[:, 0]
    nearest = distances[others][:, centers].argmin(1)
    means, sizes = group_means(x[others], nearest, count)
    sizes = sizes.float()[:, None]
    weight = 1 / (sizes + 1) if plain else torch.where(sizes > 0, beta, torch.ones_like(sizes))
    return centers, weight * x[centers] + (1 - weight) * means


def fold(x: Tensor, keep: Tensor) -> Tensor:
    """Folds the dropped rows one after another into the most similar kept row, as `(kept + dropped) / 2`.

    Args:
        x: `[n, D]` float32.
        keep: `[k]` kept rows, ascending.

    Returns:
        Tensor: `[k, D]` the kept rows; of the rows folded into one, later ones weigh more.
    """
    dropped = torch.ones(len(x), dtype=torch.bool, device=x.device).index_fill(0, keep, False).nonzero()[:, 0]
    unit = torch.nn.functional.normalize(x, dim=-1)
    target = first_equal(unit[keep])[(unit[dropped] @ unit[keep].T).argmax(1)]
    sizes = torch.bincount(target, minlength=len(keep))
    order = torch.sort(target, stable=True).indices
    target, dropped = target[order], dropped[order]
    ends = sizes.cumsum(0)[target]
    weights = torch.pow(0.5, (ends - torch.arange(len(target), device=x.device)).float())  # 1/2 for the last one
    kept = x[keep] * torch.pow(0.5, sizes.float())[:, None]
    return kept.index_add_(0, target, x[dropped] * weights[:, None])


@register("holitom")
@dataclass
class HoliTom(TwoCuts):
    """Averages and clusters the static places of windows of frames, and picks moving ones by attention in each frame.

    Paper: HoliTom (NeurIPS 2025), arXiv 2505.21334. Stage: before the decoder and, with `layer`, inside it. A place is
    static in a window if its cosine from frame to frame is above `threshold` throughout; the clip is cut into the
    windows that save the most tokens. Static places are averaged over their window and clustered (DPC-kNN, at most 7
    neighbors), a cluster being `beta * center + (1 - beta) * mean of the others`. Of the moving places each frame keeps
    those with the most attention in the vision tower. A static token takes the place in the prompt that it has in the
    window's first frame.

    In a picture every token counts as moving: the most attended ones are kept.

    With `layer`, half of the tokens are dropped again before that layer, see `TwoCuts`. Each is folded into the most
    similar kept token, as the mean of both.

    Differences from the release: the count is exact, shared over windows and frames by the tokens they have, at
    least one for a window with static places where the budget allows; if averaging would save more than the budget
    asks, the least similar places count as moving. `context_share` above 0 works (there it raises an error). Attention
    is the mean received, or that of the class token. The cut inside the decoder is off by default. On models with
    position ids on several axes (M-RoPE) a merged token has the position of its center.

    Attributes:
        threshold: Cosine above which a place is static; published: 0.65 at a ratio of 0.1, 0.8 at 0.15.
        context_share: Share of a frame's moving tokens that are cluster centers instead of picks.
        neighbors: Neighbors from which a density is computed.
        beta: Weight of a cluster's center.
        plain_mean: Clusters become plain means of center and others.
        layer: Decoder layer of the second cut, published: 18 of 28; at most the last one. None for one cut.
    """

    differentiable = True
    threshold: Cosine = 0.8
    context_share: Share = 0.0
    neighbors: Positive = 7
    beta: Share = 0.6
    plain_mean: bool = False

    def cut_late(self, tokens: Tokens) -> Choice:
        chosen = super().cut_late(tokens)
        hidden = tokens.hidden.clone()
        for start, end in zip(tokens.offsets[:-1].tolist(), tokens.offsets[1:].tolist(), strict=True):
            rows = chosen.keep[start:end].nonzero()[:, 0]
            if len(rows):
                hidden[start + rows] = fold(tokens.hidden[start:end].float(), rows).to(hidden.dtype)
        return replace(chosen, hidden=hidden)

    def taps(self, anatomy: Anatomy) -> Iterable[Tap]:
        return (projector_tap(anatomy, self.name), layer_tap(anatomy, "feature"))

    def attention(self, tokens: Tokens) -> Tensor:
        return Vision(tokens, self.name).importance()

    def choose_clip(self, x: Tensor, clip: Clip, budget: int, attention: Tensor | None) -> ClipChoice:
        assert attention is not None
        parts = split(next_similarity(x, clip), clip, self.threshold, most=len(x) - budget)
        sizes = [s.shape[1] for s in parts.static] + [len(m) for m in parts.moving]
        floors = [1] * len(parts.static) + [0] * len(parts.moving)
        counts = frame_budgets([float(n) for n in sizes], budget, sizes, floors)
        return self.merge(x, attention, parts, counts[: len(parts.static)], counts[len(parts.static) :])

    def merge(
        self, x: Tensor, attention: Tensor, parts: StaticPlaces, static: Sequence[int], moving: Sequence[int]
    ) -> ClipChoice:
        """Picks and merges with given counts.

        Args:
            x: `[n, D]` float32 states of a clip.
            attention: `[n]`.
            parts: Static and moving tokens.
            static: Tokens for the static places of each window.
            moving: Tokens for the moving places of each frame.
        """
        keep, states = [], []
        for rows, count in zip(parts.static, static, strict=True):
            rows = rows.to(x.device)
            centers, merged = self._merge(x[rows].mean(0), count)
            keep.append(rows[0, centers])
            states.append(merged)
        for rows, count in zip(parts.moving, moving, strict=True):
            rows = rows.to(x.device)
            picked = rows[largest(attention[rows], round(count * (1 - self.context_share)))]
            rest = rows[~torch.isin(rows, picked)]
            centers, merged = self._merge(x[rest], count - len(picked))
            keep += [picked, rest[centers]]
            states += [x[picked], merged]
        return ClipChoice(torch.cat(keep), torch.cat(states), attention)

    def _merge(self, x: Tensor, count: int) -> tuple[Tensor, Tensor]:
        return merge(x, count, self.neighbors, self.beta, self.plain_mean)
