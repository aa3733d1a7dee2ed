# SPDX-License-Identifier: Apache-2.0
"""SparseVLM and SparseVLM+: visually relevant text tokens rate the image; dropped tokens are recycled."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from ...core.attention import visual_attention
from ...core.method import Choice, ScoreMethod, Stage, Tap
from ...core.options import Layers, Positive, Share, Shares
from ...core.registry import register
from ...core.schedule import scale_schedule
from ...core.tokens import AttentionInputs, Tokens
from .recycling import recycle, with_clusters
from .rotation import corrected_attention, rope_base
from .text_raters import embeddings, find_raters

if TYPE_CHECKING:
    from ...models.anatomy import Anatomy

_SHARES = {1: (300 / 576, 200 / 576, 110 / 576), 2: (300 / 576, 200 / 576, 118 / 576)}


@register("sparsevlm")
@dataclass
class SparseVLM(ScoreMethod):
    """Keeps, at three depths, the tokens that visually relevant text attends to, and merges some of the others.

    Paper: SparseVLM, arXiv 2410.04417, section 3; `version=2` is SparseVLM+ of its later versions. Cuts after layers
    2, 6 and 15 of 32 have run; reads queries and keys of those layers, and the input embeddings.

    Raters are text tokens after the image with more than the mean of `mean_v softmax_t(H_v . H_t)`, chosen once, on the
    input embeddings. `score_i` is the attention from the raters, mean over heads and raters. Version 1 recycles: the
    best 30 % of the dropped tokens are clustered by density peaks, ten to a cluster, and each cluster is replaced by
    its mean, at the place of its center. Version 2 does not recycle; it divides the attention by the effect of rotation
    alone on vectors of ones, and uses only the heads with the most attention from raters to the image.

    Differences from the release: kept tokens and clusters together are exactly the budget (the release adds the
    clusters to its count); no noise in the densities, ties go to the smaller position; recycled tokens keep the place
    of their center (the release puts them behind the visual tokens); the heads of version 2 are 14/32 of the heads, its
    rotation that of the model with distances along the prompt, its divisor at least `floor` (the release divides by
    numbers near or below zero in long prompts); grouped-query attention is supported; all images of a sample are one
    group; where no text token is above the mean, all are raters; kept tokens keep their positions, as in version 2 of
    the release, unless `positions="compact"`.

    Attributes:
        version: 1, or 2 for SparseVLM+.
        layers: Cuts, before these layers of a decoder of `depth` layers, scaled to the actual depth (cuts at the same
            layer become one). Each reads the layer before it.
        shares: Share of the original tokens kept after each cut, clusters included; by default that of the version's
            192-token setting. `released` computes them from released counts.
        depth: Decoder depth that `layers` refers to; None uses them unscaled.
        heads: Version 2: number of heads, or None for 14/32 of them.
        floor: Version 2: smallest divisor, as a share of the divisor at distance 0.
        positions: `"compact"` renumbers the kept tokens 0, 1, 2, ... after every cut, as released for version 1; by
            default they keep their position ids. Not for models with position ids on several axes (M-RoPE).
    """

    differentiable = True
    question_aware: ClassVar[bool] = True

    version: Literal[1, 2] = 1
    layers: Layers = (3, 7, 16)
    shares: Shares | None = None
    depth: Positive | None = 32
    heads: Positive | None = None
    floor: Share = 0.05
    positions: Literal["original", "compact"] = "original"

    @classmethod
    def released(cls, counts: Sequence[int], total: int = 576, **options: Any) -> SparseVLM:
        """Creates the method with released counts, such as `released((303, 110, 36))`; version 1 adds clusters.

        Args:
            counts: Tokens kept by score at each cut.
            total: Visual tokens that the counts refer to.
            options: Other options.
        """
        left = counts if options.get("version") == 2 else with_clusters(counts, total)
        return cls(shares=tuple(n / total for n in left), **options)

    def schedule(self, num_layers: int) -> tuple[Stage, ...]:
        shares = _SHARES[self.version] if self.shares is None else self.shares
        return scale_schedule(self.layers, shares, self.depth, num_layers, "SparseVLM")

    def required_layer_inputs(self, num_layers: int) -> tuple[int, ...]:
        return tuple(max(stage.layer - 1, 0) for stage in self.schedule(num_layers))

    def taps(self, anatomy: Anatomy) -> Iterable[Tap]:
        return (Tap("sparsevlm.embeddings", anatomy.layers[0], embeddings),)

    def score(self, tokens: Tokens) -> Tensor:
        inputs = tokens.attention_inputs(max(tokens.layer - 1, 0))
        if "sparsevlm.raters" not in tokens.memory:
            tokens.memory["sparsevlm.raters"] = self._find_raters(tokens, inputs)
            tokens.memory["sparsevlm.text_place"] = inputs.query_order
            tokens.memory["sparsevlm.place"] = inputs.visual - inputs.key_offsets[:-1][tokens.group]
        rate = tokens.memory["sparsevlm.raters"]
        return visual_attention(inputs, rate.float()) if self.version == 1 else self._corrected(tokens, inputs, rate)

    def select(self, tokens: Tokens, scores: Tensor, recycle_by: Tensor | None = None) -> Choice:
        """Keeps tokens by `scores` and recycles others by `recycle_by`, by default the same scores."""
        if self.version == 2:
            choice = super().select(tokens, scores)
        else:
            recycle_by = scores if recycle_by is None else recycle_by
            keep, hidden = recycle(tokens.hidden, scores, recycle_by, tokens.offsets, tokens.budgets)
            choice = Choice(keep, hidden, scores)
        tokens.memory["sparsevlm.place"] = tokens.memory["sparsevlm.place"][choice.keep]
        return choice

    def _find_raters(self, tokens: Tokens, inputs: AttentionInputs) -> Tensor:
        """`[R]` bool, the text tokens that rate; all of them before the decoder, where nothing is recorded yet."""
        records = tokens.recorded.get("sparsevlm.embeddings")
        if not records or tokens.prompt is None:
            return torch.ones(len(inputs.queries), dtype=torch.bool, device=tokens.hidden.device)
        return find_raters(records[0], tokens)

    def _corrected(self, tokens: Tokens, inputs: AttentionInputs, rate: Tensor) -> Tensor:
        """`[M]` score of SparseVLM+."""
        text = tokens.memory["sparsevlm.text_place"].split(inputs.query_offsets.diff().tolist())
        rating = rate.split(inputs.query_offsets.diff().tolist())
        place = tokens.memory["sparsevlm.place"].split(tokens.offsets.diff().tolist())
        distances = [t[r][:, None] - p for t, r, p in zip(text, rating, place, strict=True)]  # [r, n] each
        base = rope_base(tokens.anatomy)
        return corrected_attention(inputs, rate, distances, tokens.offsets, base, self.heads, self.floor)
