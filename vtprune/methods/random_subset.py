# SPDX-License-Identifier: Apache-2.0
"""Random tokens: the baseline that a method has to beat."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..core.method import ScoreMethod, Stage
from ..core.options import Seed
from ..core.ragged import seeded_scores
from ..core.registry import register
from ..core.tokens import Tokens


@register("random")
@dataclass
class Random(ScoreMethod):
    """Keeps a uniformly drawn subset of each group, before the decoder.

    No paper; the control of the pruning literature. The draws come from a generator of the method's own, started
    afresh with `seed` for every pool: two runs agree, a sample alone agrees with the same sample in a batch, and the
    global generator is neither read nor moved.

    `score_i` is uniform in [0, 1): each token of a group is as likely to stay as any other.

    Attributes:
        seed: Start of the generator, on the CPU whatever the device of the model.
    """

    seed: Seed = 0

    def schedule(self, num_layers: int) -> tuple[Stage, ...]:
        return (Stage(0),)

    def score(self, tokens: Tokens) -> Tensor:
        return seeded_scores(tokens.offsets, self.seed)
