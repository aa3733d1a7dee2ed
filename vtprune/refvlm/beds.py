# SPDX-License-Identifier: Apache-2.0
"""Held-out questions about pictures of several kinds and sizes, pairs and clips, for the built-in Qwen2.5-VL."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from PIL import Image

from . import clips, crowds, pages, scenes
from .scenes import Question

SIZES: dict[str, tuple[tuple[int, int], ...]] = {
    "scenes": ((6, 6), (9, 9), (24, 24)),
    "crowds": ((16, 16), (24, 24), (36, 36)),
    "pages": ((12, 12), (20, 20), (36, 36)),
    "pairs": ((9, 9),),
    "clips": ((6, 6), (9, 9)),
}
CELL = pages.CELL  # pixels of one visual token in each direction
STEPS = 4  # time steps of a clip


class Sample(NamedTuple):
    """A question about one picture, two pictures or the frames of a clip."""

    pictures: list[Image.Image]
    question: str
    answer: str
    kind: str
    clip: bool = False

    def inputs(self) -> dict[str, Any]:
        """Keyword arguments of the processor."""
        if self.clip:
            return {"videos": [self.pictures], "text": f"<video> {self.question} answer:"}
        return {"images": self.pictures, "text": f"{'<image>' * len(self.pictures)} {self.question} answer:"}


def names() -> list[str]:
    """Names of all beds, such as "pages 12 x 12": a kind of picture and its rows and columns of visual tokens."""
    return [f"{kind} {rows} x {columns}" for kind, sizes in SIZES.items() for rows, columns in sizes]


def samples(name: str, count: int) -> list[Sample]:
    """The first `count` questions of a bed; training draws other seeds."""
    kind, rows, _, columns = name.split()
    grid = (int(rows), int(columns))
    if kind == "pairs":
        return [_pair(seed, grid) for seed in range(count)]
    if kind == "clips":
        drawn: Iterable[Any] = (clips.clip(seed, grid, STEPS) for seed in range(count))
        return [Sample(list(clip.frames), q.text, q.answer, q.kind, True) for clip, q in evenly(drawn)]
    make = {"scenes": lambda seed, grid: scenes.scene(seed), "crowds": crowds.crowd, "pages": pages.page}[kind]
    size = (grid[1] * CELL, grid[0] * CELL)
    found = evenly(make(seed, grid) for seed in range(count))
    return [Sample([_sized(one.image, size)], q.text, q.answer, q.kind) for one, q in found]


def evenly(pictures: Iterable[Any], each: int = 1) -> Iterator[tuple[Any, Question]]:
    """Some questions on every picture, about the same number of each kind (not every picture has all)."""
    total: Counter[str] = Counter()
    for picture in pictures:
        # The least frequent kinds so far come first, so that rare kinds (a digit needs a sign) catch up.
        for question in sorted(picture.questions, key=lambda question: total[question.kind])[:each]:
            total[question.kind] += 1
            yield picture, question


def _pair(seed: int, grid: tuple[int, int]) -> Sample:
    """A question about the first or the second of two scenes."""
    pair = [scenes.scene(2 * seed), scenes.scene(2 * seed + 1)]
    number = seed % 2
    asked = [q for q in pair[number].questions if q.kind != "size" and not q.text.startswith("does")]
    question = asked[seed // 2 % len(asked)]
    text = question.text.removesuffix("?").removesuffix(" in the image") + f" in the {pages.ORDER[number]} image?"
    size = (grid[1] * CELL, grid[0] * CELL)
    return Sample([_sized(scene.image, size) for scene in pair], text, question.answer, question.kind)


def _sized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)
