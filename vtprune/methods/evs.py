# SPDX-License-Identifier: Apache-2.0
"""EVS: the tokens that changed since the frame before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..core.clips import Clip, ClipChoice, ClipMethod, largest, similarity_to
from ..core.registry import register
from ..errors import MethodError

FIRST_FRAME = 255.0


def dissimilarity(x: Tensor, clip: Clip) -> Tensor:
    """`1 - cosine` `[n]` of every token with the one at its place in the frame before; 255 where there is none."""
    before = clip.at_same_place(range(-1, clip.frames - 1))
    return 1 - similarity_to(x, before, missing=1 - FIRST_FRAME)


@register("evs")
@dataclass
class EVS(ClipMethod):
    """Efficient Video Sampling: the first frame whole, then the tokens least like the frame before.

    Paper: EVS, arXiv 2510.14624. Stage: before the decoder. `1 - cos(X[t, p], X[t - 1, p])` with the frame before as it
    came, not with what was kept of it; the largest stay, over the whole clip. A place that the frame before lacks
    counts as new. The paper compares pixels of patches; the release (vLLM's) and this method compare projected tokens.

    Differences from the release: the count is exact. A budget below the tokens of the first frame is refused, where the
    release raises it: a clip of `T` frames needs a share of `1 / T` at least. Pictures are refused, where the release
    leaves them whole.
    """

    needs_frames: ClassVar[bool] = True

    def choose_clip(self, x: Tensor, clip: Clip, budget: int, attention: Tensor | None) -> ClipChoice:
        if budget < clip.sizes[0]:
            raise MethodError(
                f"evs keeps the first frame whole: {clip.sizes[0]} tokens of a clip of {clip.frames} frames, and the "
                f"budget of this clip is {budget}; keep a share of {clip.sizes[0] / len(x):.3f} or more, or use "
                "'vcast', which thins every frame"
            )
        scores = dissimilarity(x, clip)
        return ClipChoice(largest(scores, budget), scores=scores)
