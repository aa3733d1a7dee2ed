# SPDX-License-Identifier: Apache-2.0
"""Frames of clips: tokens at the same place of different frames, and methods that select tokens clip by clip."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..errors import MethodError
from .attention import visual_attention
from .method import Choice, Group, Method, Stage, Tap
from .options import Positive
from .ragged import settle_ties, top_k
from .tokens import Tokens

if TYPE_CHECKING:
    from ..models.anatomy import Anatomy


# Distance, 1 minus the cosine, up to which tokens at the same place count as equal. The rounding of their features and
# of the cosine, which differs between a clip in a batch and alone, makes about 2e-7.
EQUAL = 1e-6


@dataclass(frozen=True)
class Clip:
    """Frame and place of every token of one clip, on the CPU; a picture is a clip of one frame.

    Attributes:
        frame: `[n]` int64, ascending from 0 without gaps. Frames count in the temporal grid of the encoder: Qwen models
            merge two sampled frames into one.
        place: `[n]` int64. Equal numbers in different frames are the same place of the picture.
    """

    frame: Tensor
    place: Tensor

    @classmethod
    def of_grid(cls, frames: int, places: int) -> Clip:
        """Clip whose frames all have the same places, in order."""
        return cls(torch.arange(frames).repeat_interleave(places), torch.arange(places).repeat(frames))

    @functools.cached_property
    def sizes(self) -> list[int]:
        """Number of tokens in each frame."""
        return torch.bincount(self.frame).tolist()

    @property
    def frames(self) -> int:
        return len(self.sizes)

    @functools.cached_property
    def table(self) -> Tensor:
        """Number `[T, Q]` of the token at each place of each frame, -1 where a frame has none."""
        table = torch.full((self.frames, int(self.place.max()) + 1), -1)
        table[self.frame, self.place] = torch.arange(len(self.frame))
        return table

    def at_same_place(self, reference: Sequence[int]) -> Tensor:
        """For each token, the token at the same place of another frame.

        Args:
            reference: For each frame, the number of the other frame, -1 for none.

        Returns:
            Tensor: `[n]` number of the token, -1 if there is no such frame or it lacks the place.
        """
        other = torch.as_tensor(reference)[self.frame]
        return torch.where(other < 0, -1, self.table[other.clamp_min(0), self.place])

    def frame_means(self, x: Tensor) -> Tensor:
        """Means `[T, D]` over the tokens of each frame of `x` `[n, D]`."""
        return torch.stack([part.mean(0) for part in x.split(self.sizes)])


def similarity_to(x: Tensor, other: Tensor, missing: float) -> Tensor:
    """Cosine similarity `[n]` of every row of `x` `[n, D]` and row `other` `[n]`; `missing` where `other` is negative.

    Rows that are equal up to rounding (see `EQUAL`) have similarity 1 exactly. A row of zeros has similarity 0 to every
    other.
    """
    other = other.to(x.device)
    compared = x[other.clamp_min(0)]
    cosine = torch.cosine_similarity(x, compared, dim=-1, eps=1e-8)
    cosine = torch.where((cosine > 1 - EQUAL) | (x == compared).all(-1) & (x != 0).any(-1), 1.0, cosine)
    return torch.where(other < 0, missing, cosine)


def cut_segments(similarity: Tensor, least: int, threshold: float) -> list[int]:
    """Cuts a clip into segments between dissimilar neighboring frames.

    Args:
        similarity: `[T - 1]` cosine similarity of each frame and the next.
        least: Smallest number of segments, if there are enough frames: the clip is cut at the `least - 1` smallest
            similarities (ties: earlier).
        threshold: The clip is also cut at every similarity below it.

    Returns:
        list[int]: Number of frames in each segment.
    """
    similarity = similarity.cpu()
    cuts = similarity < threshold
    cuts[settle_ties(-similarity).sort(descending=True, stable=True).indices[: max(least - 1, 0)]] = True
    edges = [0, *(cuts.nonzero()[:, 0] + 1).tolist(), len(similarity) + 1]
    return [b - a for a, b in zip(edges, edges[1:], strict=False)]


def largest(scores: Tensor, count: int) -> Tensor:
    """Indices `[count]` of the largest scores, ascending; ties (see `TIE` in `ragged`) go to the smaller index."""
    return settle_ties(scores).sort(descending=True, stable=True).indices[:count].sort().values


@dataclass
class ClipTokens:
    """The visual tokens of one clip or picture, and their budget.

    Attributes:
        clip: Frames and places of the tokens that have a place.
        rows: `[n]` their rows in `Tokens`, frame by frame. On the CPU.
        budget: Number of them that stay.
        kept_unplaced: Rows of tokens without a place (a newline at the end of a clip) that stay: as many as the budget
            allows after all tokens with a place.
    """

    clip: Clip
    rows: Tensor
    budget: int
    kept_unplaced: Tensor


def clips_of(tokens: Tokens) -> list[ClipTokens]:
    """The clips and pictures of a batch with their budgets; those without tokens are left out."""
    origins = (tokens.group, tokens.frame, tokens.crop, tokens.grid_row, tokens.grid_col)
    group, frame, crop, row, col = torch.stack(origins).cpu()
    out = []
    for number, budget in enumerate(tokens.budgets.tolist()):
        members = (group == number).nonzero()[:, 0]
        if not len(members):
            continue
        placed = row[members] >= 0
        if not placed.any():  # places are unknown: one frame in the order of the prompt
            clip = Clip.of_grid(1, len(members))
            out.append(ClipTokens(clip, members, min(budget, len(members)), members[:0]))
            continue
        rows, unplaced = members[placed], members[~placed]
        rows = rows[frame[rows].sort(stable=True).indices]
        numbers = torch.unique(frame[rows], return_inverse=True)[1]
        places = torch.unique(torch.stack([crop[rows], row[rows], col[rows]]), dim=1, return_inverse=True)[1]
        inside = min(budget, len(rows))
        out.append(ClipTokens(Clip(numbers, places), rows, inside, unplaced[: budget - inside]))
    return out


@dataclass
class ClipChoice:
    """The tokens of one clip that a method keeps.

    Attributes:
        keep: `[budget]` numbers of the tokens, in any order.
        states: `[budget, D]` their new states, in the order of `keep`, for methods that merge.
        scores: `[n]` scores that the method ranked by, for reports.
    """

    keep: Tensor
    states: Tensor | None = None
    scores: Tensor | None = None


class ClipMethod(Method):
    """A method that selects tokens clip by clip, before the decoder; a picture is a clip of one frame.

    Class attributes:
        whole: The frames that are kept whole, in words, for methods with a `least_budget`.
    """

    group: ClassVar[Group] = "image"
    whole: ClassVar[str] = ""

    def taps(self, anatomy: Anatomy) -> Iterable[Tap]:
        if self.needs_frames and "video" not in anatomy.placeholders:
            raise MethodError(
                f"{self.name} compares the frames of clips, and {type(anatomy.model).__name__} takes pictures only; "
                "choose a method that prunes pictures, such as 'iwp' or 'divprune'"
            )
        return ()

    def attention(self, tokens: Tokens) -> Tensor | None:
        """Attention `[M]` that the tokens receive in the vision tower, for methods that read it."""
        return None

    def least_budget(self, sizes: Sequence[int]) -> int:
        """Number of tokens that the method always keeps of a clip whose frames have `sizes` tokens."""
        return 0

    def check(self, sizes: Sequence[int], budget: int) -> None:
        """Raises `MethodError` if the method cannot keep `budget` tokens of a clip whose frames have `sizes` tokens."""
        if self.needs_frames and len(sizes) < 2:
            raise MethodError(
                f"{self.name} compares the frames of a clip, and this prompt has a picture or a clip of one frame; "
                f"name a method for pictures: vtprune.patch(model, method='iwp', video_method='{self.name}')"
            )
        least, total = self.least_budget(sizes), sum(sizes)
        if budget < least:
            raise MethodError(
                f"{self.name} keeps {self.whole} whole: {least} of the {total} tokens of this clip of {len(sizes)} "
                f"frames, but the budget of the clip is {budget}; use a ratio of {least / total:.3f} or more, or "
                "'vcast', which thins every frame"
            )

    def choose_clip(self, x: Tensor, clip: Clip, budget: int, attention: Tensor | None) -> ClipChoice:
        """Selects the tokens of one clip.

        Args:
            x: `[n, D]` float32 states, frame by frame.
            clip: Frames and places of the tokens.
            budget: Number of tokens that stay, from 1 to `n - 1`.
            attention: `[n]` rows of `attention`.
        """
        raise NotImplementedError

    def choose(self, tokens: Tokens) -> Choice:
        device, count = tokens.hidden.device, len(tokens)
        keep = torch.zeros(count, dtype=torch.bool, device=device)
        scores = torch.full((count,), torch.nan, device=device, dtype=torch.float32)
        hidden, attention = tokens.hidden, self.attention(tokens)
        for part in clips_of(tokens):
            rows = part.rows.to(device)
            keep[part.kept_unplaced.to(device)] = True
            if part.budget in (0, len(rows)):
                keep[rows] = part.budget > 0
                continue
            self.check(part.clip.sizes, part.budget)
            chosen = self.choose_clip(
                tokens.hidden[rows].float(), part.clip, part.budget, None if attention is None else attention[rows]
            )
            keep[rows[chosen.keep]] = True
            if chosen.scores is not None:
                scores[rows] = chosen.scores
            if chosen.states is not None:
                hidden = hidden.clone() if hidden is tokens.hidden else hidden
                hidden[rows[chosen.keep]] = chosen.states.to(hidden)
        return Choice(keep, None if hidden is tokens.hidden else hidden, scores)


@dataclass
class TwoCuts(ClipMethod):
    """A method for clips with an optional second cut, inside the decoder.

    The second cut keeps the tokens to which the last position of the prompt attends most in the layer before it,
    averaged over heads.

    Class attributes:
        shares: Published shares of the tokens that are left after the first cut and after the second.

    Attributes:
        layer: Decoder layer before which the second cut is made; None for one cut, before the decoder.
    """

    shares: ClassVar[tuple[float, float]] = (0.1, 0.05)

    layer: Positive | None = field(default=None, kw_only=True)

    def schedule(self, num_layers: int) -> tuple[Stage, ...]:
        if self.layer is None:
            return (Stage(0),)
        return Stage(0, self.shares[0]), Stage(min(self.layer, num_layers - 1), self.shares[1])

    def required_layer_inputs(self, num_layers: int) -> tuple[int, ...]:
        return tuple(stage.layer - 1 for stage in self.schedule(num_layers)[1:])

    def choose(self, tokens: Tokens) -> Choice:
        return self.cut_late(tokens) if tokens.stage else super().choose(tokens)

    def cut_late(self, tokens: Tokens) -> Choice:
        """Selects the tokens that stay at the second cut."""
        scores = visual_attention(tokens.attention_inputs(tokens.layer - 1, queries="last"))
        return Choice(top_k(scores, tokens.offsets, tokens.budgets), scores=scores)
