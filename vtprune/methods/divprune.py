# SPDX-License-Identifier: Apache-2.0
"""DivPrune: a subset of visual tokens with maximal minimum distance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vtprune_kernels import weighted_farthest_point

from ..core.method import Choice, Method, Stage
from ..core.ragged import from_order
from ..core.registry import register
from ..core.tokens import Tokens


@register("divprune")
@dataclass
class DivPrune(Method):
    """Keeps a subset of maximal minimum distance between projected features, before the decoder.

    Paper: DivPrune, arXiv 2503.02175 (CVPR 2025), section 3. Reads only the visual embeddings in the prompt; the whole
    sample is one group (thumbnail, tiles and newlines together). With `D = 1 - cos` the first pick is the token whose
    nearest neighbor is farthest away; every further one is `argmax_i min_{j picked} D_ij`.

    Differences from the release: picked tokens are masked (there they only have a distance near 0, and with half
    precision can be picked twice); the distance is float32; images after the first are pruned too.

    Attributes:
        positions: `"compact"` renumbers the kept tokens 0, 1, 2, ..., as the release does; by default they keep their
            position ids. Not for models with position ids on several axes (M-RoPE).
    """

    positions: Literal["original", "compact"] = "original"

    def schedule(self, num_layers: int) -> tuple[Stage, ...]:
        return (Stage(0, 0.098),)

    def choose(self, tokens: Tokens) -> Choice:
        order = weighted_farthest_point(
            tokens.hidden, None, tokens.offsets, tokens.budgets, tokens.max_budget, tokens.max_length
        )
        return Choice(from_order(order, len(tokens)))
