# SPDX-License-Identifier: Apache-2.0
"""Seeded pictures of any size with many small objects, and questions whose answer tokens are known.

A crowd holds up to sixteen objects that are one to three visual tokens wide whatever the size of the picture, so that a
large picture has much background and little that matters. Some shapes and colors occur once, so that questions can name
their object by them. The questions are those of `scenes`, without the one about sizes.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from functools import cached_property

import numpy as np
from PIL import Image, ImageDraw

from . import scenes
from .drawing import _background, _fill, _write_digit
from .scene_objects import COLORS, DIGITS, HORIZONTAL, SHAPES, VERTICAL, SceneObject

CELL = 12  # pixels of one visual token in each direction
KINDS = tuple(kind for kind in scenes.KINDS if kind != "size")
# Rows and columns of visual tokens.
GRIDS = ((12, 12), (12, 16), (16, 12), (16, 16), (14, 18), (20, 20), (24, 18), (24, 24), (24, 32), (32, 32), (36, 36))


@dataclasses.dataclass(frozen=True)
class CrowdObject(SceneObject):
    """One object of a crowd. Lengths are pixels; `patches` are visual tokens, the most central one first."""

    canvas: tuple[int, int] = (0, 0)  # height and width of the picture

    @property
    def vertical(self) -> str:
        return VERTICAL[2 * self.y > self.canvas[0]]

    @property
    def horizontal(self) -> str:
        return HORIZONTAL[2 * self.x > self.canvas[1]]


@dataclasses.dataclass(frozen=True)
class Crowd:
    """A picture and its objects; `image` and `questions` are created on first use."""

    seed: int
    grid: tuple[int, int]
    objects: tuple[CrowdObject, ...]

    @cached_property
    def image(self) -> Image.Image:
        return draw(self.objects, self.grid, backdrop(self.seed, self.grid))

    @cached_property
    def questions(self) -> tuple[scenes.Question, ...]:
        """At most one question of every kind, in the order of `KINDS`."""
        rng = random.Random(f"crowd questions {self.seed}")
        asked = (scenes.ask(self.objects, kind, rng) for kind in KINDS)
        return tuple(question for question in asked if question is not None)


def crowd(seed: int, grid: tuple[int, int] | None = None) -> Crowd:
    """Creates the crowd of a seed.

    Args:
        seed: the same seed and grid give the same picture and questions.
        grid: rows and columns of visual tokens; one of `GRIDS` by default.
    """
    rng = random.Random(f"crowd {seed}")
    grid = grid or rng.choice(GRIDS)
    objects: list[CrowdObject] = []
    for color, shape in kinds(rng, wanted=max(3, min(16, grid[0] * grid[1] // 22))):
        item = place(rng, objects, color, shape, grid)
        if item is not None:
            objects.append(item)
    return Crowd(seed, grid, tuple(objects))


def kinds(rng: random.Random, wanted: int) -> list[tuple[str, str]]:
    """Color and shape of every object: some of either occur once, two colors never."""
    colors = rng.sample(tuple(COLORS), 6)
    shapes = rng.sample(SHAPES, len(SHAPES))
    found = [(colors[0], rng.choice(shapes[3:])), (colors[1], rng.choice(shapes[3:]))]
    found += [(rng.choice(colors[2:]), shape) for shape in shapes[: rng.choice((1, 2, 3))]]
    found += [(rng.choice(colors[2:]), rng.choice(shapes[3:])) for _ in range(wanted - len(found))]
    found = found[:wanted]
    rng.shuffle(found)
    return found


def place(
    rng: random.Random, others: Sequence[CrowdObject], color: str, shape: str, grid: tuple[int, int]
) -> CrowdObject | None:
    """A new object at a free spot, or None where none was found; no two objects share a visual token."""
    height, width = grid[0] * CELL, grid[1] * CELL
    radius = rng.randint(15, 18) if shape == "sign" else rng.randint(9, 14)
    rgb = tuple(min(255, max(0, value + rng.randint(-18, 18))) for value in COLORS[color])
    digit = rng.choice(DIGITS) if shape == "sign" else None
    for _ in range(40):
        x, y = rng.randint(radius + 1, width - radius - 1), rng.randint(radius + 1, height - radius - 1)
        if min(abs(2 * x - width), abs(2 * y - height)) < 12:
            continue  # its quadrant would be ambiguous
        if any(max(abs(x - o.x), abs(y - o.y)) <= radius + o.half_width + 4 for o in others):
            continue
        item = CrowdObject(shape, color, "", digit, x, y, radius, radius, rgb, (), (height, width))  # type: ignore[arg-type]
        cells = covered(item, grid)
        if not any(set(cells) & set(other.patches) for other in others):
            return dataclasses.replace(item, patches=cells)
    return None


def covered(item: SceneObject, grid: tuple[int, int]) -> tuple[int, ...]:
    """Visual tokens of which the object covers at least a fifth, the one at its center first."""
    rows, columns = grid
    left, top = max(0, (item.x - item.half_width) // CELL), max(0, (item.y - item.half_height) // CELL)
    right = min(columns, (item.x + item.half_width) // CELL + 1)
    bottom = min(rows, (item.y + item.half_height) // CELL + 1)
    part = dataclasses.replace(item, x=item.x - left * CELL, y=item.y - top * CELL)
    mask = Image.new("L", ((right - left) * CELL, (bottom - top) * CELL))
    _fill(ImageDraw.Draw(mask), part, 255)
    share = np.asarray(mask, dtype=np.float32).reshape(bottom - top, CELL, right - left, CELL).mean((1, 3)) / 255
    center = min(item.y // CELL, rows - 1) * columns + min(item.x // CELL, columns - 1)
    cells = {
        (top + row) * columns + left + column: float(share[row, column])
        for row, column in np.argwhere(share >= 0.2).tolist()
    }
    order = sorted(cells, key=lambda cell: (cell != center, -cells[cell], cell))
    return tuple(order) if order and order[0] == center else (center, *order)


def backdrop(seed: int, grid: tuple[int, int]) -> Image.Image:
    """A light textured background of `grid` visual tokens."""
    plain = Image.fromarray(np.clip(_background(seed), 0, 255).astype(np.uint8))
    return plain.resize((grid[1] * CELL, grid[0] * CELL), Image.Resampling.BILINEAR)


def draw(objects: Sequence[SceneObject], grid: tuple[int, int], background: Image.Image) -> Image.Image:
    """`background` with the objects on it."""
    image = background.copy()
    pen = ImageDraw.Draw(image)
    for item in objects:
        _fill(pen, item, item.rgb)
        if item.digit:
            _write_digit(pen, item)
    return image
