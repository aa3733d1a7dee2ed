# SPDX-License-Identifier: Apache-2.0
"""Requests for every model, and the settings and engines that they run with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

TOKENS = 5  # generated per request
BLOCK = 32  # tokens per KV cache block, the minimum on a CPU
STEP = 32  # tokens per step of the chunked engine, fewer than in most prompts

PLAIN = {"enable_chunked_prefill": False, "enable_prefix_caching": False, "max_num_batched_tokens": 2048}
CHUNKED = {"enable_chunked_prefill": True, "enable_prefix_caching": True, "max_num_batched_tokens": STEP}
# Text before the image that fills whole blocks.
LONG = " ".join(f"word{i}" for i in range(20, 60))


@dataclass(frozen=True)
class Request:
    """A text in which `@` stands for each image and `%` for each clip.

    Attributes:
        images: Seed, width and height of each.
        clips: Seed, frames, width and height of each.
    """

    text: str
    images: tuple[tuple[int, int, int], ...] = ()
    clips: tuple[tuple[int, int, int, int], ...] = ()

    def pictures(self) -> list[Image.Image]:
        """The images, random noise by seed."""
        return [picture(*image) for image in self.images]

    def videos(self) -> list[tuple[np.ndarray, dict[str, Any]]]:
        """The clips `[T, H, W, 3]` with their vLLM metadata."""
        return [(clip(*shape), clip_facts(shape[1])) for shape in self.clips]

    def data(self) -> dict[str, Any]:
        """vLLM's `multi_modal_data`."""
        given = {"image": self.pictures(), "video": self.videos()}
        return {modality: items for modality, items in given.items() if items}


@dataclass(frozen=True)
class Run:
    """An engine: its `"vtprune"` settings (None: unpruned) and options of `LLM`."""

    name: str
    config: dict[str, Any] | None
    engine: dict[str, Any] = field(default_factory=dict)


def picture(seed: int, width: int, height: int) -> Image.Image:
    """A picture of random noise."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def clip(seed: int, frames: int, width: int, height: int) -> np.ndarray:
    """A clip in which a part of the picture changes from frame to frame."""
    draw = np.random.default_rng(seed)
    still = draw.integers(0, 255, (height, width, 3), dtype=np.uint8)
    moving = draw.integers(0, 255, (frames, height // 2, width, 3), dtype=np.uint8)
    return np.concatenate([moving, np.broadcast_to(still[height // 2 :], (frames, *still[height // 2 :].shape))], 1)


def clip_facts(frames: int) -> dict[str, Any]:
    """vLLM metadata of a clip: two frames per second, all of them used."""
    told = {"fps": 2.0, "duration": frames / 2, "total_num_frames": frames, "frames_indices": list(range(frames))}
    return {**told, "video_backend": "opencv", "do_sample_frames": False}


def clip_requests() -> list[Request]:
    """Clips of several lengths and sizes, with images, after text that fills a block, and at the end of a prompt."""
    return [
        Request("word1 % word2 word3", clips=((20, 4, 64, 48),)),
        Request(f"{LONG} % word2", clips=((21, 8, 32, 64),)),
        Request("word5 @ word6 % word7 % word1", ((22, 64, 32),), ((23, 6, 48, 48), (24, 4, 32, 32))),
        Request("word5 % word8 @", ((25, 40, 64),), ((26, 4, 64, 64),)),
        Request("word2 %", clips=((27, 6, 64, 64),)),
    ]


def requests(several: bool = True, text: bool = True) -> list[Request]:
    """Prompts with no, one and several images of different sizes.

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
    """Sixteen concurrent requests: `single`, filled up with requests for other images."""
    more = [
        Request(
            r.text,
            tuple((seed + 100 * turn, w, h) for seed, w, h in r.images),
            tuple((seed + 100 * turn, *shape) for seed, *shape in r.clips),
        )
        for turn in range(1, 16)
        for r in single
        if r.images or r.clips
    ]
    return [*single, *more][:16]


def runs(methods: tuple[str, ...], tower: bool = False) -> list[Run]:
    """The unpruned run and one per method (`divprune`: plain and chunked); ratios and counts alternate.

    Args:
        methods: Names of methods.
        tower: Whether to add an engine that cuts the vision tower.
    """
    out = [
        Run("unpruned", None, CHUNKED),
        Run("divprune-plain", {"method": "divprune", "ratio": 0.25}, PLAIN),
        Run("divprune-chunked", {"method": "divprune", "keep": 9}, CHUNKED),
    ]
    for number, method in enumerate(m for m in methods if m != "divprune"):
        budget = {"keep": 7} if number % 2 else {"ratio": 0.3}
        engine = ("plain", PLAIN) if number % 2 else ("chunked", CHUNKED)
        out.append(Run(f"{method}-{engine[0]}", {"method": method, **budget}, engine[1]))
    if tower:
        cut = {"method": "Change", "keep": 0.5, "block": 1}
        out.append(Run("tower-chunked", {"method": "divprune", "ratio": 0.25, "tower": cut}, CHUNKED))
    return out


def clip_runs(methods: tuple[str, ...]) -> list[Run]:
    """The unpruned run and one per clip method, with `divprune` for images."""
    out = [Run("unpruned", None, CHUNKED)]
    for number, method in enumerate(methods):
        engine = ("plain", PLAIN) if number % 2 else ("chunked", CHUNKED)
        # Not the default for images: resprune would pick 79 tokens in 64 dimensions, and the order after 64 depends on
        # rounding.
        config = {"method": "divprune", "ratio": 0.55, "video_method": method}
        out.append(Run(f"{method}-{engine[0]}", config, engine[1]))
    return out
