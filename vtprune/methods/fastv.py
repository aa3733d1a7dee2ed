# SPDX-License-Identifier: Apache-2.0
"""FastV: drops the tokens that the last prompt token attends to least, after an early layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..core.attention import visual_attention
from ..core.method import ScoreMethod, Stage
from ..core.options import Count, Seed
from ..core.ragged import seeded_scores
from ..core.registry import register
from ..core.tokens import Tokens


@register("fastv")
@dataclass
class FastV(ScoreMethod):
    """Keeps the tokens with the largest attention of the last prompt token, in the decoder before layer K.

    Paper: An Image is Worth 1/2 Tokens After Layer 2, arXiv 2403.06764, section 4. One cut before layer K; reads
    queries and keys of layer K-1.

    `score_i = mean over heads of softmax_j(q_last . k_j / sqrt(dh))_i`, the softmax over all keys of the sample.

    Differences from the release: tokens are removed once, at the prefill (the accuracy tables of the paper come from a
    mask that is recomputed at every decoding step); the image's tokens are located, not given by an offset, which was
    one token too large; positions are kept, as in the release. K is clamped to the last layer. With K
    = 0 (or in a decoder of one layer) there is no layer K-1 to read and the choice is random, as in the release.

    Attributes:
        layer: K, the layer before which tokens are dropped.
        seed: Seed of the generator for K = 0.
    """

    question_aware: ClassVar[bool] = True

    layer: Count = 2
    seed: Seed = 0

    def schedule(self, num_layers: int) -> tuple[Stage, ...]:
        return (Stage(min(self.layer, num_layers - 1), 0.5),)

    def required_layer_inputs(self, num_layers: int) -> tuple[int, ...]:
        cut = self.schedule(num_layers)[0].layer
        return (cut - 1,) if cut else ()

    def score(self, tokens: Tokens) -> Tensor:
        if tokens.layer == 0:
            return seeded_scores(tokens.offsets, self.seed)
        return visual_attention(tokens.attention_inputs(tokens.layer - 1, queries="last"))
