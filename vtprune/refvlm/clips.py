# SPDX-License-Identifier: Apache-2.0
"""Seeded short clips of objects that move, change or follow each other, with known answer tokens.

A clip has two to five steps of two frames each; Qwen2.5-VL joins the two frames of a step into one layer of visual
tokens. Three kinds of clips: one object moves among others that rest, one object changes its color, or objects appear
one after another, each for one step.
"""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass
from functools import cached_property

from PIL import Image

from .crowds import CELL, CrowdObject, backdrop, covered, draw
from .scene_objects import COLORS, SHAPES
from .scenes import Question

EVENTS = ("move", "change", "follow")
GRIDS = ((5, 5), (6, 6), (6, 8), (8, 6), (7, 7), (8, 8), (9, 9))
FRAMES = 2  # of one step


@dataclass(frozen=True)
class Clip:
    """A clip and its objects; `frames` are drawn on first use.

    Attributes:
        steps: for every step, the objects that it shows. Their `patches` are numbers within the step's own grid.
    """

    seed: int
    grid: tuple[int, int]
    event: str
    steps: tuple[tuple[CrowdObject, ...], ...]

    @cached_property
    def frames(self) -> tuple[Image.Image, ...]:
        """`FRAMES` equal pictures for every step."""
        plain = backdrop(self.seed, self.grid)
        return tuple(image for shown in self.steps for image in [draw(shown, self.grid, plain)] * FRAMES)

    @cached_property
    def questions(self) -> tuple[Question, ...]:
        """All questions about what happens, in random order."""
        rng = random.Random(f"clip questions {self.seed}")
        found = ask(self)
        rng.shuffle(found)
        return tuple(found)

    def cells(self, *shown: tuple[int, CrowdObject]) -> tuple[int, ...]:
        """Visual tokens of objects, each with the number of its step, counted over the whole clip."""
        size = self.grid[0] * self.grid[1]
        return tuple(dict.fromkeys(step * size + cell for step, item in shown for cell in item.patches))


def clip(seed: int, grid: tuple[int, int] | None = None, steps: int | None = None, event: str | None = None) -> Clip:
    """Creates the clip of a seed; grid, number of steps and event are drawn by default."""
    rng = random.Random(f"clip {seed}")
    grid = grid or rng.choice(GRIDS)
    steps = steps or rng.choice((3, 4, 4, 5))
    event = event or rng.choice(EVENTS)
    shapes = rng.sample(SHAPES[:-1], len(SHAPES) - 1)
    if event == "follow":
        # A step shows one object; shapes do not repeat, so that "after the circle" is one step.
        shown = [(_somewhere(rng, grid, [], rng.choice(tuple(COLORS)), shape),) for shape in shapes[:steps]]
        return Clip(seed, grid, event, tuple(shown))
    hero = _somewhere(rng, grid, [], rng.choice(tuple(COLORS)), shapes[0])
    resting: list[CrowdObject] = []
    if event == "move":
        target = hero
        while (target.vertical, target.horizontal) == (hero.vertical, hero.horizontal):
            target = _somewhere(rng, grid, [], hero.color, hero.shape)
        path = [_between(hero, target, step / (steps - 1), grid) for step in range(steps)]
    else:
        other = rng.choice([color for color in COLORS if color != hero.color])
        when = rng.randrange(1, steps)
        changed = dataclasses.replace(hero, color=other, rgb=COLORS[other])
        path = [hero if step < when else changed for step in range(steps)]
    for shape in shapes[1 : 1 + rng.choice((0, 1, 2))]:
        item = _somewhere(rng, grid, [*path, *resting], rng.choice(tuple(COLORS)), shape, tries=20)
        if item is not None:
            resting.append(item)
    return Clip(seed, grid, event, tuple((moved, *resting) for moved in path))


def _somewhere(rng, grid, others, color, shape, tries: int = 0):
    """An object at a place clear of the middle lines; None where `tries` places were taken by `others`."""
    height, width = grid[0] * CELL, grid[1] * CELL
    radius = rng.randint(9, 13)
    rgb = tuple(min(255, max(0, value + rng.randint(-18, 18))) for value in COLORS[color])
    for _ in range(tries or 1000):
        x, y = rng.randint(radius + 1, width - radius - 1), rng.randint(radius + 1, height - radius - 1)
        if min(abs(2 * x - width), abs(2 * y - height)) < 8:
            continue
        if any(max(abs(x - o.x), abs(y - o.y)) <= radius + o.half_width + 3 for o in others):
            continue
        item = CrowdObject(shape, color, "", None, x, y, radius, radius, rgb, (), (height, width))
        item = dataclasses.replace(item, patches=covered(item, grid))
        if not any(set(item.patches) & set(other.patches) for other in others):
            return item
    return None


def _between(start: CrowdObject, end: CrowdObject, share: float, grid: tuple[int, int]) -> CrowdObject:
    x, y = (round(a + (b - a) * share) for a, b in ((start.x, end.x), (start.y, end.y)))
    item = dataclasses.replace(start, x=x, y=y)
    return dataclasses.replace(item, patches=covered(item, grid))


def ask(on: Clip) -> list[Question]:
    """Every question about what happens in a clip."""
    last = len(on.steps) - 1
    if on.event == "follow":
        found = []
        for step in range(last):
            one, other = on.steps[step][0], on.steps[step + 1][0]
            both = on.cells((step + 1, other), (step, one))
            found.append(Question(f"what came after the {one.shape}?", other.shape, "after", both))
            both = on.cells((step, one), (step + 1, other))
            found.append(Question(f"what came before the {other.shape}?", one.shape, "before", both))
        return found
    first, final = on.steps[0][0], on.steps[last][0]
    name = first.shape
    if on.event == "change":
        when = next(step for step, shown in enumerate(on.steps) if shown[0].color != first.color)
        after, before = on.cells((when, final)), on.cells((when - 1, first))
        return [
            Question(f"what color does the {name} become?", final.color, "becomes", after + before),
            Question("what changes?", name, "changes", after + before),
        ]
    place, origin = (f"{item.vertical} {item.horizontal}" for item in (final, first))
    ends = on.cells((last, final)), on.cells((0, first))
    return [
        Question(f"where does the {name} go?", place, "goes", ends[0] + ends[1]),
        Question(f"where does the {name} start?", origin, "starts", ends[1] + ends[0]),
        Question("what moves?", name, "moves", ends[0] + ends[1]),
    ]
