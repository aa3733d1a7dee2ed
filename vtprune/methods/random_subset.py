# SPDX-License-Identifier: Apache-2.0
"""Random pruning, the baseline of all other methods."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..core.method import ScoreMethod
from ..core.options import Seed
from ..core.ragged import seeded_scores
from ..core.registry import register
from ..core.tokens import Tokens


@register("random")
@dataclass
class Random(ScoreMethod):
    """Keeps a uniformly drawn subset of each group, before the decoder.

    No paper; the control of the pruning literature. The draws come from a generator of the method's own, seeded
    with `seed` for every group: two runs agree, a sample alone agrees with the same sample in a batch, and the global
    random state is not touched.

    `score_i` is uniform in [0, 1): each token of a group is as likely to stay as any other.

    Attributes:
        seed: Seed of the generator, which runs on the CPU so that every device keeps the same tokens.
    """

    seed: Seed = 0

    def score(self, tokens: Tokens) -> Tensor:
        return seeded_scores(tokens.offsets, self.seed)
