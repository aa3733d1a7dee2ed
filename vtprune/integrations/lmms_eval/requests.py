# SPDX-License-Identifier: Apache-2.0
"""lmms-eval's requests as batches of prompts and pictures, and what is logged about each."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lmms_eval.api.instance import Instance, TokenCounts
from PIL import Image

from ...report import Pruning


@dataclass
class PrunedTokenCounts(TokenCounts):
    """lmms-eval's token counts of a request, and what pruning did to it.

    Written to the samples file (`--log_samples`) under `token_counts`.

    Attributes:
        visual_tokens: Visual tokens of the prompt; 0 where the request has no picture.
        kept_visual_tokens: Those that survived to the last layer.
        mean_ratio: Mean share of the visual tokens over the inputs of the decoder layers.
        stages: `[layer, visual tokens kept]` for every cut; layer 0 is before the decoder.
    """

    visual_tokens: int = 0
    kept_visual_tokens: int = 0
    mean_ratio: float = 1.0
    stages: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, pruning: Pruning | None, sample: int, input_tokens: int, output_tokens: int) -> PrunedTokenCounts:
        """Counts of one sample of a prefill; of a request without visual tokens where `pruning` is None."""
        counts = cls(input_tokens=input_tokens, output_tokens=output_tokens)
        if pruning is None or not len(pruning.visual[sample]):
            return counts
        counts.visual_tokens = len(pruning.visual[sample])
        counts.kept_visual_tokens = len(pruning.kept[sample])
        layers = pruning.per_layer(sample)
        counts.mean_ratio = sum(layers) / (len(layers) * counts.visual_tokens)
        counts.stages = tuple((layer, len(kept[sample])) for layer, kept in pruning.stages)
        return counts

    def to_dict(self) -> dict[str, Any]:
        return {
            **super().to_dict(),
            "visual_tokens": self.visual_tokens,
            "kept_visual_tokens": self.kept_visual_tokens,
            "mean_ratio": round(self.mean_ratio, 6),
            "stages": [list(stage) for stage in self.stages],
        }


def batches(requests: Sequence[Instance], size: int) -> Iterator[list[Instance]]:
    """Neighbouring requests of one task and split with the same generation options, at most `size` together.

    A batch never crosses tasks: each has its own way of making messages.
    """
    for _, group in itertools.groupby(requests, key=lambda request: (request.args[2], *request.args[4:6])):
        together = list(group)
        for start in range(0, len(together), size):
            yield together[start : start + size]


def square(picture: Any, mean: Sequence[float]) -> Image.Image:
    """The picture in the middle of a square of its longer side, filled with the processor's mean colour.

    What LLaVA 1.5 was trained on and evaluated with (`image_aspect_ratio: pad`); the stock processors of transformers
    crop the longer side away instead.

    Args:
        picture: A picture, or the place of one.
        mean: `image_mean` of the processor, three shares of full colour.
    """
    if not isinstance(picture, Image.Image):
        from transformers.image_utils import load_image

        picture = load_image(picture)
    picture = picture.convert("RGB")
    width, height = picture.size
    if width == height:
        return picture
    side = max(width, height)
    red, green, blue = (int(share * 255) for share in mean)
    canvas = Image.new("RGB", (side, side), (red, green, blue))
    canvas.paste(picture, ((side - width) // 2, (side - height) // 2))
    return canvas
