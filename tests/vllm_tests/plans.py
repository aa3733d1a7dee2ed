# SPDX-License-Identifier: Apache-2.0
"""What is asked of every model: requests, and the settings and engines that they are put to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

TOKENS = 5  # that every request generates
BLOCK = 32  # tokens of a block of the KV cache: the fewest that the CPU allows
STEP = 32  # tokens of a step of the chunked engine, fewer than most prompts have

PLAIN = {"enable_chunked_prefill": False, "enable_prefix_caching": False, "max_num_batched_tokens": 2048}
CHUNKED = {"enable_chunked_prefill": True, "enable_prefix_caching": True, "max_num_batched_tokens": STEP}
# A text that fills whole blocks, before the image.
LONG = " ".join(f"word{i}" for i in range(20, 60))


@dataclass(frozen=True)
class Request:
    """A text in which `@` stands for each image, and the images by seed, width and height."""

    text: str
    images: tuple[tuple[int, int, int], ...] = ()

    def pictures(self) -> list[Image.Image]:
        """The images: noise, which no two seeds share."""
        return [picture(*image) for image in self.images]


@dataclass(frozen=True)
class Run:
    """An engine: what stands under `"vtprune"` (None: unpruned), and options of `LLM`."""

    name: str
    config: dict[str, Any] | None
    engine: dict[str, Any] = field(default_factory=dict)


def picture(seed: int, width: int, height: int) -> Image.Image:
    """A picture of noise."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def requests(several: bool = True, text: bool = True) -> list[Request]:
    """One and several images, of different sizes, and none.

    Args:
        several: Whether prompts of the model may hold several images.
        text: Whether they may hold none.
    """
    out = [
        Request("word1 @ word2 word3", ((0, 32, 32),)),
        Request("word1 @ word4 word3", ((1, 96, 64),)),
        Request(f"{LONG} @ word2", ((2, 64, 64),)),
        Request(f"{LONG} @ word2", ((3, 40, 96),)),  # the same text before another image
    ]
    if several:
        out += [
            Request("word5 @ word9 @ word2 word3", ((4, 64, 64), (5, 40, 90))),
            Request("word7 @ word8 @ word9 @ word1", ((6, 32, 32), (0, 32, 32), (7, 96, 96))),
        ]
    return out + ([Request("word4 word8")] if text else [])


def batch(single: list[Request]) -> list[Request]:
    """Sixteen requests at once: those, and as many with other images as are missing."""
    more = [
        Request(r.text, tuple((seed + 100 * turn, w, h) for seed, w, h in r.images))
        for turn in range(1, 16)
        for r in single
        if r.images
    ]
    return [*single, *more][:16]


def runs(methods: tuple[str, ...]) -> list[Run]:
    """Every method in one engine, `divprune` in both; ratios and counts in turn; unpruned for comparison."""
    out = [
        Run("unpruned", None, CHUNKED),
        Run("divprune-plain", {"method": "divprune", "ratio": 0.25}, PLAIN),
        Run("divprune-chunked", {"method": "divprune", "keep": 9}, CHUNKED),
    ]
    for number, method in enumerate(m for m in methods if m != "divprune"):
        budget = {"keep": 7} if number % 2 else {"ratio": 0.3}
        engine = ("plain", PLAIN) if number % 2 else ("chunked", CHUNKED)
        out.append(Run(f"{method}-{engine[0]}", {"method": method, **budget}, engine[1]))
    return out
