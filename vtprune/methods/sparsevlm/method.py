# SPDX-License-Identifier: Apache-2.0
"""SparseVLM and SparseVLM+: text tokens that see the image rate it, and what is dropped is recycled."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

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
    """Keeps, at three depths, the tokens that the visually relevant words attend to, and merges some of the others.

    Paper: SparseVLM, arXiv 2410.04417, section 3; `version=2` is SparseVLM+ of its later versions. Cuts after layers
    2, 6 and 15 of 32 have run; reads queries and keys of those layers, and the input embeddings.

    Raters are text tokens after the image with more than the mean of `mean_v softmax_t(H_v . H_t)`, chosen once, on
    the input embeddings. `score_i` is the attention from the raters, mean over heads and raters. Version 1 recycles:
    the best 30 % of the dropped tokens are clustered by density peaks, ten to a cluster, and each cluster lives on as
    its mean, in the column of its center. Version 2 does not recycle; it divides the attention by what rotation alone
    gives vectors of ones, and looks only at the heads with most attention from raters to the image.

    Differences from the release: kept tokens and clusters together are exactly the budget (the release adds the
    clusters to its count); no noise in the densities, ties go to the smaller column; recycled tokens keep the place of
    their center (the release puts them behind the visual tokens); the heads of version 2 are 14/32 of the heads, its
    rotation that of the model with positions taken along the prompt, its divisor at least `floor` (the release divides
    by numbers near or below zero in long prompts); KV heads may be grouped; all images of a sample are one group; where
    no word is above the mean, all are raters; survivors keep their positions, as in version 2 of the release, unless
    `positions="compact"`.

    Attributes:
        version: 1, or 2 for SparseVLM+.
        layers: Cuts, before these layers of a decoder of `depth` layers, scaled to the decoder at hand (cuts that meet
            become one). Each reads the layer before it.
        shares: Share of the original tokens left after each cut, clusters included; by default that of the version's
            192-token setting. `released` makes them of released counts.
        depth: Decoder length that `layers` refers to; None takes them as they are.
        heads: Version 2: number of heads, or None for 14/32 of them.
        floor: Version 2: least divisor, as a share of the divisor at distance 0.
        positions: `"compact"` renumbers the survivors 0, 1, 2, ... after every cut, as released for version 1; by
            default they keep their positions. Not for models that place tokens on several axes.
    """

    version: Literal[1, 2] = 1
    layers: Layers = (3, 7, 16)
    shares: Shares | None = None
    depth: Positive | None = 32
    heads: Positive | None = None
    floor: Share = 0.05
    positions: Literal["original", "compact"] = "original"

    @classmethod
    def released(cls, counts: Sequence[int], total: int = 576, **options: Any) -> SparseVLM:
        """With the counts of a released schedule, to which version 1 adds its clusters: `released((303, 110, 36))`.

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
        """Chooses by `scores`, and what to recycle by `recycle_by`, if that is given."""
        if self.version == 2:
            choice = super().select(tokens, scores)
        else:
            recycle_by = scores if recycle_by is None else recycle_by
            keep, hidden = recycle(tokens.hidden, scores, recycle_by, tokens.offsets, tokens.budgets)
            choice = Choice(keep, hidden, scores)
        tokens.memory["sparsevlm.place"] = tokens.memory["sparsevlm.place"][choice.keep]
        return choice

    def _find_raters(self, tokens: Tokens, inputs: AttentionInputs) -> Tensor:
        """`[R]` bool; before the decoder, where text has not been seen yet, all."""
        records = tokens.recorded.get("sparsevlm.embeddings")
        if not records or tokens.prompt is None:
            return torch.ones(len(inputs.queries), dtype=torch.bool, device=tokens.hidden.device)
        return find_raters(records[0], tokens)

    def _corrected(self, tokens: Tokens, inputs: AttentionInputs, rate: Tensor) -> Tensor:
        """The score of SparseVLM+, `[M]`."""
        asked = tokens.memory["sparsevlm.text_place"].split(inputs.query_offsets.diff().tolist())
        rating = rate.split(inputs.query_offsets.diff().tolist())
        place = tokens.memory["sparsevlm.place"].split(tokens.offsets.diff().tolist())
        distances = [a[r][:, None] - p for a, r, p in zip(asked, rating, place, strict=True)]  # [r, n] each
        base = rope_base(tokens.anatomy)
        return corrected_attention(inputs, rate, distances, tokens.offsets, base, self.heads, self.floor)
