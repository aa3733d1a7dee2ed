# SPDX-License-Identifier: Apache-2.0
"""The public easy-VQA set (MIT): one circle, rectangle or triangle on a plain 64 x 64 background, 13 answers.

The pictures and the train/test split are those of the `easy-vqa` package; nothing is redrawn or filtered. The
reference model's processor enlarges the pictures to 144 x 144 like any other.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from PIL import Image

from ..errors import InputError


class Sample(NamedTuple):
    """One question of the set."""

    image_id: int
    question: str
    answer: str

    @property
    def kind(self) -> str:
        """`yes/no`, `color` or `shape`: what the answer is."""
        if self.answer in ("yes", "no"):
            return "yes/no"
        return "shape" if self.answer in ("circle", "rectangle", "triangle") else "color"


def _package():
    try:
        import easy_vqa
    except ImportError as error:
        raise ImportError("the easy-VQA pictures come with a package of their own: pip install easy-vqa") from error
    return easy_vqa


def samples(split: str) -> list[Sample]:
    """All questions of `split` ("train": 38,575 on 4,000 images; "test": 9,673 on 1,000)."""
    if split not in ("train", "test"):
        raise InputError(f"easy-VQA has the splits 'train' and 'test', not {split!r}; name one of them")
    package = _package()
    texts, answers, images = package.get_train_questions() if split == "train" else package.get_test_questions()
    return [Sample(*row) for row in zip(images, texts, answers, strict=True)]


def image_paths(split: str) -> dict[int, str]:
    """Image id to file, for `split` "train" or "test"."""
    package = _package()
    return package.get_train_image_paths() if split == "train" else package.get_test_image_paths()


def load(split: str) -> Iterator[tuple[Image.Image, Sample]]:
    """Every question of `split` with its RGB picture (the same object for questions on one picture)."""
    paths = image_paths(split)
    image_id: int | None = None
    image = Image.new("RGB", (1, 1))
    for sample in samples(split):
        if sample.image_id != image_id:
            with Image.open(paths[sample.image_id]) as file:
                image_id, image = sample.image_id, file.convert("RGB")
        yield image, sample
