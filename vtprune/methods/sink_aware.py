# SPDX-License-Identifier: Apache-2.0
"""SinkAware: removes the attention sinks of clips from the attention that another method ranks by."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..core.method import Choice, Method, ScoreMethod
from ..core.options import AboveZero, AtLeastZero
from ..core.registry import register
from ..core.tokens import Tokens
from ..core.wrapper import Wrapper
from ..errors import MethodError
from .visionzip import VisionZip

_STATIC = 1e-3  # share of the mean attention; a clip whose frames differ by less is one still picture


def without_sinks(attention: Tensor, clip: Tensor, place: Tensor, strength: float, power: float) -> Tensor:
    """Attention minus the excess that its place gets in all frames.

    Args:
        attention: `[M]`, NaN for tokens that have none.
        clip: `[M]` int64 index of the clip that each token belongs to.
        place: `[M]` int64 index of its place in the frame, -1 for none.
        strength: Amount subtracted at the place with the largest mean, in units of the clip's mean attention.
        power: Exponent of the mean over frames.

    Returns:
        Tensor: `[M]` float32. Tokens without a place, and clips of one frame or of equal frames, are unchanged.
    """
    attention = attention.float()
    known = (place >= 0) & torch.isfinite(attention)
    keys = torch.stack([clip, place], 1)[known]
    places, inverse, frames = torch.unique(keys, dim=0, return_inverse=True, return_counts=True)
    clips = int(clip.max()) + 1 if len(clip) else 0
    values, owner = attention[known], places[:, 0]

    def by_clip(source: Tensor, index: Tensor, how: str) -> Tensor:
        return source.new_zeros(clips).scatter_reduce(0, index, source, how, include_self=False)

    mean = values.new_zeros(len(places)).index_add_(0, inverse, values) / frames
    level = by_clip(values, clip[known], "mean")
    moved = by_clip((values - mean[inverse]).abs(), clip[known], "amax") > _STATIC * level
    several = by_clip(frames.to(values), owner, "amax") > 1
    sink = mean.clamp_min(0) ** power
    low, high = by_clip(sink, owner, "amin")[owner], by_clip(sink, owner, "amax")[owner]
    sink = torch.where(high > low, (sink - low) / (high - low), 0.0) * (moved & several)[owner]
    out = attention.clone()
    out[known] = values - strength * level[clip[known]] * sink[inverse]
    return out


@register("sink_aware")
@dataclass
class SinkAware(Wrapper):
    """Removes attention sinks of clips from another method's scores: `SinkAware(VisionZip())`, `SinkAware(FastVID())`.

    Paper: SToP, arXiv 2604.20937. Some places get much attention in every frame, regardless of content. With `a[t, p]`
    the attention of place `p` in frame `t`, `sink_p = minmax_p((mean_t a[t, p])^power)` within a clip, and the host
    ranks by `a - strength * mean(a) * sink`. Hosts: every method with scores, and every one that ranks by the attention
    of the vision tower. Pictures and clips of equal frames are not corrected: there the mean over frames is the
    saliency of the picture itself.

    Differences from the paper: the strength is in units of the clip's mean attention (published is an absolute 0.03 for
    VisionZip on a tower of 729 patches, which is 22 of them); later cuts inside the decoder, which see only part
    of the tokens, are not corrected.

    Attributes:
        host: The method to correct.
        strength: Strength of the correction, 0 (none) or more.
        power: Exponent of the mean attention before scaling, above 0.
    """

    host: Method = field(default_factory=VisionZip)
    strength: AtLeastZero = 22.0
    power: AboveZero = 1.1

    def choose(self, tokens: Tokens) -> Choice:
        if tokens.stage > 0:
            return self.host.choose(tokens)
        if isinstance(self.host, ScoreMethod):
            return self.host.select(tokens, self.corrected(self.host.score(tokens), tokens))
        read = False

        def correct(attention: Tensor) -> Tensor:
            nonlocal read
            read = True
            return self.corrected(attention, tokens)

        choice = self.host.choose(dataclasses.replace(tokens, correct_attention=correct))
        if not read and bool((tokens.frame > 0).any()):
            raise MethodError(
                f"SinkAware corrects attention, but {type(self.host).__name__} ranked a clip without reading any; use "
                "a host with attention scores, such as VisionZip or FastV"
            )
        return choice

    def corrected(self, attention: Tensor, tokens: Tokens) -> Tensor:
        """`[M]` attention with the sinks of clips removed."""
        columns = int(tokens.grid_col.max()) + 1 if len(tokens) else 1
        rows = int(tokens.grid_row.max()) + 1 if len(tokens) else 1
        place = (tokens.crop * rows + tokens.grid_row) * columns + tokens.grid_col
        place = torch.where((tokens.grid_row >= 0) & (tokens.grid_col >= 0), place, -1)
        clip = torch.unique(torch.stack([tokens.sample, tokens.image], 1), dim=0, return_inverse=True)[1]
        device = attention.device
        return without_sinks(attention, clip.to(device), place.to(device), self.strength, self.power)
