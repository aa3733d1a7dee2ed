# SPDX-License-Identifier: Apache-2.0
"""PyramidDrop: drops the least attended tokens at several decoder layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from ..core.attention import visual_attention
from ..core.method import ScoreMethod, Stage
from ..core.options import Layers, Positive, Shares
from ..core.registry import register
from ..core.schedule import scale_schedule
from ..core.tokens import Tokens


@register("pyramiddrop")
@dataclass
class PyramidDrop(ScoreMethod):
    """Keeps, at several depths, the tokens with the largest attention of the last prompt token.

    Paper: PyramidDrop, arXiv 2410.17247, section 3.2. Cuts before layers 8, 16 and 24 of 32; reads queries and keys of
    the layer after the cut, so nothing is stored from layers that already ran.

    `score_i = mean over heads of softmax_j(q_last . k_j / sqrt(dh))_i`, the softmax over all keys of the sample.

    Differences from the release: grouped-query attention is supported; all images of a sample are one group; counts
    are rounded, not truncated; kept tokens keep their positions, unless `positions="compact"`. The release and this
    method rank by the last token of the answer header, the paper by the last instruction token.

    Attributes:
        layers: Cuts, as layers of a decoder of `depth` layers, scaled to the actual depth (cuts at the same layer
            become one).
        shares: Share of the original tokens kept after each cut.
        depth: Decoder depth that `layers` refers to; None uses them unscaled.
        positions: `"compact"` renumbers the kept tokens 0, 1, 2, ... after every cut, as released; by default they keep
            their position ids. Not for models with position ids on several axes (M-RoPE).
    """

    question_aware: ClassVar[bool] = True

    layers: Layers = (8, 16, 24)
    shares: Shares = (0.5, 0.25, 0.125)
    depth: Positive | None = 32
    positions: Literal["original", "compact"] = "original"

    def schedule(self, num_layers: int) -> tuple[Stage, ...]:
        return scale_schedule(self.layers, self.shares, self.depth, num_layers, "PyramidDrop")

    def score(self, tokens: Tokens) -> Tensor:
        return visual_attention(tokens.attention_inputs(queries="last"))
