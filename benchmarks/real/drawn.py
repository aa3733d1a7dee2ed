# SPDX-License-Identifier: Apache-2.0
"""Pictures with known answers over photographs: a few drawn objects, many small ones, and pages of large text.

Objects and questions are those of `vtprune.refvlm`. What lies behind them is a random part of a photograph of
scikit-image; the photographs in `HELD_OUT` are never seen in training. Objects have a light rim, as stickers have, so
that a black one can be told from a night sky.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageEnhance, ImageOps

from vtprune.refvlm import crowds, pages, scenes
from vtprune.refvlm.drawing import _fill, _write_digit
from vtprune.refvlm.scene_objects import SIZE

from . import parts
from .photo_vlm import PATCH

HELD_OUT = ("chelsea", "coffee", "rocket", "coins")
KINDS = ("scene", "crowd", "page")
PAGE = (8, 8)  # rows and columns of the cells in which pages are laid out, two characters each
RIM = (250, 250, 250)


class Picture(NamedTuple):
    """A square picture of `grid` x `grid` patches.

    Attributes:
        drawn: the scene, crowd or page of `vtprune.refvlm` that was drawn, with its objects or words.
    """

    kind: str
    grid: int
    image: Image.Image
    drawn: Any

    @property
    def questions(self) -> tuple[scenes.Question, ...]:
        """At most one question of every kind."""
        return tuple(self.drawn.questions)


@lru_cache(maxsize=2)
def photographs(training: bool) -> tuple[Image.Image, ...]:
    """The photographs for training, or the held-out ones."""
    return tuple(one.image for one in parts.photographs() if (one.name not in HELD_OUT) is training)


def picture(kind: str, seed: int, grid: int) -> Picture:
    """Draws the picture of a seed.

    Seeds below `scenes.TRAIN_SEEDS` are held out and lie on the held-out photographs, others on altered ones.

    Args:
        kind: one of `KINDS`.
        seed: the same seed, kind and grid give the same picture.
        grid: patches in each direction.
    """
    rng = random.Random(f"picture {kind} {seed} {grid}")
    training, side = seed >= scenes.TRAIN_SEEDS, grid * PATCH
    if kind == "page":
        page = pages.page(seed, PAGE)
        return Picture(kind, grid, page.image.resize((side, side), Image.Resampling.BICUBIC), page)
    if kind == "crowd":
        crowd = crowds.crowd(seed, (grid, grid))
        image = stuck(background(rng, grid * crowds.CELL, training), crowd.objects, rim=1)
        return Picture(kind, grid, image.resize((side, side), Image.Resampling.BICUBIC), crowd)
    scene = scenes.scene(seed)
    image = stuck(background(rng, SIZE, training), scene.objects, rim=3)
    return Picture(kind, grid, image.resize((side, side), Image.Resampling.BICUBIC), scene)


def background(rng: random.Random, side: int, altered: bool) -> Image.Image:
    """A random square part of a photograph; `altered` ones are mirrored, turned, and have other colors and light."""
    photograph = rng.choice(photographs(altered))
    most = min(photograph.size)
    part = rng.randint(most // 3, most)
    left, top = rng.randint(0, photograph.width - part), rng.randint(0, photograph.height - part)
    image = photograph.crop((left, top, left + part, top + part)).resize((side, side), Image.Resampling.BICUBIC)
    if not altered:
        return image
    if rng.random() < 0.5:
        image = ImageOps.mirror(image)
    image = image.rotate(rng.choice((0, 0, 90, 180, 270)))
    if rng.random() < 0.5:
        image = Image.merge("RGB", rng.sample(image.split(), 3))
    image = ImageEnhance.Brightness(image).enhance(rng.uniform(0.6, 1.4))
    return ImageEnhance.Color(image).enhance(rng.uniform(0.2, 1.6))


def stuck(image: Image.Image, objects: Sequence[scenes.SceneObject], rim: int) -> Image.Image:
    """The picture with objects on it, each with a light rim of some pixels."""
    pen = ImageDraw.Draw(image)
    for item in objects:
        wider = dataclasses.replace(item, half_width=item.half_width + rim, half_height=item.half_height + rim)
        _fill(pen, wider, RIM)
        _fill(pen, item, item.rgb)
        if item.digit:
            _write_digit(pen, item)
    return image
