# SPDX-License-Identifier: Apache-2.0
"""Seeded pictures of a few objects, with questions whose answer patches are known.

`scene(seed)` always draws the same picture: two to five objects (circle, rectangle, triangle, star, cross, or a sign
that carries a digit) in eight colors and two sizes on a textured background with clutter. Every question names the
patches that hold its answer, as row-major indices into the 12 x 12 grid that the reference model sees, so a pruning
method can be compared with a selection of the answer's patches.

Seeds below `TRAIN_SEEDS` are held out: training draws only seeds from there on.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from PIL import Image

from .drawing import draw_scene, place
from .scene_objects import CELL, COLORS, DIGITS, GRID, HORIZONTAL, NUMBERS, SHAPES, SIZE, SIZES, VERTICAL, SceneObject

__all__ = [
    "CELL", "COLORS", "DIGITS", "GRID", "HORIZONTAL", "KINDS", "NUMBERS", "SHAPES", "SIZE", "SIZES", "TRAIN_SEEDS",
    "VERTICAL", "Question", "Scene", "SceneObject", "ask", "caption", "interleave", "scene",
]  # fmt: skip

TRAIN_SEEDS = 1_000_000
KINDS = ("color", "shape", "size", "position", "count", "presence", "digit")


@dataclass(frozen=True)
class Question:
    """A question with its only right answer and the patches that hold it.

    `patches` is ordered: the most central patch of every object concerned, then their second ones, and so on. Where
    the answer is an absence ("no", "zero") it lists all objects: only seeing each of them proves that none matches.
    """

    text: str
    answer: str
    kind: str
    patches: tuple[int, ...]


@dataclass(frozen=True)
class Scene:
    """A picture and its objects; `image`, `small` and `questions` are created on first use."""

    seed: int
    objects: tuple[SceneObject, ...]

    @cached_property
    def image(self) -> Image.Image:
        return draw_scene(self.seed, self.objects)

    @cached_property
    def small(self) -> Image.Image:
        """The picture with one visual token per cell of `patches`, as the built-in LLaVA reduces it."""
        side = SIZE // 2
        return self.image.resize((side, side), Image.Resampling.BICUBIC)

    @cached_property
    def questions(self) -> tuple[Question, ...]:
        """At most one question of every kind, in the order of `KINDS`."""
        rng = random.Random(f"questions {self.seed}")
        asked = (ask(self.objects, kind, rng) for kind in KINDS)
        return tuple(question for question in asked if question is not None)


def scene(seed: int) -> Scene:
    """Creates the scene of a seed; the same seed gives the same picture and questions."""
    rng = random.Random(f"scene {seed}")
    wanted = rng.choice((2, 3, 3, 4, 4, 5))
    # Counting needs repetition: in most scenes some objects share their color or their shape.
    shared = rng.choice((1, 2, 2, 3, 3, 3)) if wanted > 2 else rng.choice((1, 2))
    by_color = rng.random() < 0.5
    color, shape = rng.choice(tuple(COLORS)), rng.choice(SHAPES[:-1])
    objects: list[SceneObject] = []
    with_sign = rng.random() < 0.75
    for index in range(wanted):
        if index < shared:
            mine = (color, rng.choice(SHAPES[:-1])) if by_color else (rng.choice(tuple(COLORS)), shape)
        else:
            mine = (rng.choice(tuple(COLORS)), rng.choice(SHAPES[:-1]))
        if index == wanted - 1 and with_sign:
            mine = (mine[0], "sign")
        item = place(rng, objects, *mine)
        if item is not None:
            objects.append(item)
    if with_sign and objects[-1].shape != "sign":  # there was no room: the sign replaces the last object
        last = objects.pop()
        objects.append(place(rng, objects, last.color, "sign") or last)
    rng.shuffle(objects)
    return Scene(seed, tuple(objects))


def ask(objects: Sequence[SceneObject], kind: str, rng: random.Random) -> Question | None:
    """One random question of this kind about these objects, or None where no unambiguous one exists."""
    return _ASK[kind](objects, rng)


def caption(objects: Sequence[SceneObject]) -> str:
    """Every object in reading order of its center patch: "big red star top left , ..."."""
    ordered = sorted(objects, key=lambda item: item.patches[0])
    return " , ".join(
        f"{t.size} {t.color} {t.shape} {t.digit or ''} {t.vertical} {t.horizontal}".replace("  ", " ") for t in ordered
    )


def interleave(objects: Sequence[SceneObject]) -> tuple[int, ...]:
    """The patches of several objects, the most central ones first, without repetition."""
    longest = max((len(item.patches) for item in objects), default=0)
    ranked = (t.patches[rank] for rank in range(longest) for t in objects if rank < len(t.patches))
    return tuple(dict.fromkeys(ranked))


def _only(objects: Sequence[SceneObject], **want: str) -> bool:
    return sum(all(getattr(t, key) == value for key, value in want.items()) for t in objects) == 1


def _descriptions(objects: Sequence[SceneObject], hide: str = "") -> list[tuple[str, SceneObject]]:
    """Phrases that fit exactly one object and do not mention the attribute `hide`."""
    found = []
    for item in objects:
        if hide != "shape" and _only(objects, shape=item.shape):
            found.append((item.shape, item))
        if hide != "color" and _only(objects, color=item.color):
            found.append((f"{item.color} object", item))
        if not hide and _only(objects, color=item.color, shape=item.shape):
            found += [(f"{item.color} {item.shape}", item)] * 2
    return found


def _ask_color(objects: Sequence[SceneObject], rng: random.Random) -> Question | None:
    if not (options := _descriptions(objects, hide="color")):
        return None
    name, item = rng.choice(options)
    text = rng.choice(("what color is the {}?", "what is the color of the {}?")).format(name)
    return Question(text, item.color, "color", item.patches)


def _ask_shape(objects: Sequence[SceneObject], rng: random.Random) -> Question | None:
    if not (options := _descriptions(objects, hide="shape")):
        return None
    weights = [0.5 if item.shape == "sign" else 1.0 for _, item in options]  # else "sign" would be a good guess
    _, item = rng.choices(options, weights)[0]
    text = rng.choice(("what shape is the {} object?", "what is the {} shape?", "what is the {} object?"))
    return Question(text.format(item.color), item.shape, "shape", item.patches)


def _ask_size(objects: Sequence[SceneObject], rng: random.Random) -> Question | None:
    if not (options := _descriptions(objects)):
        return None
    name, item = rng.choice(options)
    text = rng.choice(("is the {} big or small?", "what size is the {}?")).format(name)
    return Question(text, item.size, "size", item.patches)


def _ask_position(objects: Sequence[SceneObject], rng: random.Random) -> Question | None:
    if not (options := _descriptions(objects)):
        return None
    name, item = rng.choice(options)
    return Question(f"where is the {name}?", f"{item.vertical} {item.horizontal}", "position", item.patches)


def _ask_count(objects: Sequence[SceneObject], rng: random.Random) -> Question | None:
    # Higher counts occur in fewer scenes, so they are preferred where they occur: answers come out about even.
    options: dict[int, list[tuple[str, list[SceneObject]]]] = {}
    for color in COLORS:
        match = [t for t in objects if t.color == color]
        options.setdefault(len(match), []).append((f"{color} objects", match))
    for shape in SHAPES:
        match = [t for t in objects if t.shape == shape]
        plural = "crosses" if shape == "cross" else f"{shape}s"
        options.setdefault(len(match), []).append((plural, match))
    counts = [count for count in options if count < 4]
    count = rng.choices(counts, [(0.7, 0.7, 1.4, 4.0)[c] for c in counts])[0]
    name, match = rng.choice(options[count])
    return Question(f"how many {name} are there?", NUMBERS[count], "count", interleave(match or objects))


def _ask_presence(objects: Sequence[SceneObject], rng: random.Random) -> Question | None:
    yes = rng.random() < 0.5
    form = rng.choice(("color", "shape", "both", "both"))
    colors, shapes = {t.color for t in objects}, {t.shape for t in objects}
    if yes:
        item = rng.choice(objects)
        color, shape = item.color, item.shape
    elif form == "both":
        # Mostly near misses: a color and a shape that both occur, but on different objects.
        near = rng.random() < 0.6
        pairs = [(c, s) for c in COLORS for s in SHAPES if (c in colors) + (s in shapes) == (2 if near else 1)]
        pairs = [pair for pair in pairs if pair not in {(t.color, t.shape) for t in objects}]
        if not pairs:
            return None
        color, shape = rng.choice(pairs)
    else:
        color = rng.choice([c for c in COLORS if c not in colors])
        shape = rng.choice([s for s in SHAPES if s not in shapes] or [""])
        if form == "shape" and not shape:
            return None
    name = {"color": f"{color} object", "shape": shape, "both": f"{color} {shape}"}[form]
    match = [t for t in objects if form == "shape" or t.color == color]
    match = [t for t in match if form == "color" or t.shape == shape]
    text = rng.choice(("is there a {}?", "is there a {} in the image?", "does the image contain a {}?")).format(name)
    return Question(text, "yes" if match else "no", "presence", interleave(match or objects))


def _ask_digit(objects: Sequence[SceneObject], rng: random.Random) -> Question | None:
    if not (signs := [t for t in objects if t.shape == "sign"]):
        return None
    sign = rng.choice(signs)
    name = rng.choice(("sign", f"{sign.color} sign"))
    return Question(f"what digit is on the {name}?", sign.digit or "", "digit", sign.patches)


_ASK = {
    "color": _ask_color,
    "shape": _ask_shape,
    "size": _ask_size,
    "position": _ask_position,
    "count": _ask_count,
    "presence": _ask_presence,
    "digit": _ask_digit,
}
