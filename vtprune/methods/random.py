# SPDX-License-Identifier: Apache-2.0
"""Random tokens: the baseline that a method has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import ScoreMethod, Stage, Tokens
from .registry import register


@register("random")
@dataclass
class Random(ScoreMethod):
    """Keeps a uniformly drawn subset of each pool, before the decoder.

    No paper; the control of the pruning literature. The draws come from a generator of the method's own, started
    afresh with `seed` for every pool: two runs agree, a sample alone agrees with the same sample in a batch, and the
    global generator is neither read nor moved.

    `score_i` is uniform in [0, 1): each token of a pool is as likely to stay as any other.

    Attributes:
        seed: Start of the generator, on the CPU whatever the device of the model.
    """

    seed: int = 0

    def schedule(self, num_layers: int) -> tuple[Stage, ...]:
        return (Stage(0),)

    def score(self, tokens: Tokens) -> Tensor:
        draws = []
        for length in tokens.segments.diff().tolist():
            generator = torch.Generator().manual_seed(self.seed)  # on the CPU, so that every device draws the same
            draws.append(torch.rand(length, generator=generator))
        return torch.cat(draws).to(tokens.hidden.device) if draws else tokens.hidden.new_zeros(0)
