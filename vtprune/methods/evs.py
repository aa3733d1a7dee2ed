# SPDX-License-Identifier: Apache-2.0
"""EVS: keeps the tokens that changed since the previous frame."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..core.clips import Clip, ClipChoice, ClipMethod, largest, similarity_to
from ..core.registry import register

FIRST_FRAME = 255.0  # as released; above every cosine distance


def dissimilarity(x: Tensor, clip: Clip) -> Tensor:
    """`1 - cosine` `[n]` of every token with the one at its place in the previous frame; 255 where there is none."""
    before = clip.at_same_place(range(-1, clip.frames - 1))
    return 1 - similarity_to(x, before, missing=1 - FIRST_FRAME)


@register("evs")
@dataclass
class EVS(ClipMethod):
    """Keeps the first frame whole, and of the others the tokens least similar to the previous frame.

    Paper: EVS (Efficient Video Sampling), arXiv 2510.14624. Stage: before the decoder. The tokens with the largest `1 -
    cos(X[t, p], X[t - 1, p])` of the whole clip are kept; the previous frame is compared unpruned. A place that it
    lacks counts as new. The paper compares pixels of patches; the release (vLLM's) and this method compare projected
    tokens.

    Differences from the release: the count is exact. A budget below the tokens of the first frame raises an error,
    where the release raises the budget: a clip of `T` frames needs a ratio of at least `1 / T`. Pictures are refused;
    the release leaves them whole.
    """

    needs_frames: ClassVar[bool] = True
    whole: ClassVar[str] = "the first frame"

    def least_budget(self, sizes: Sequence[int]) -> int:
        return sizes[0]

    def choose_clip(self, x: Tensor, clip: Clip, budget: int, attention: Tensor | None) -> ClipChoice:
        scores = dissimilarity(x, clip)
        return ClipChoice(largest(scores, budget), scores=scores)
