# SPDX-License-Identifier: Apache-2.0
"""Seeded pictures of a few objects, with questions whose answer patches are known.

`scene(seed)` always draws the same picture: two to five objects (circle, rectangle, triangle, star, cross, or a sign
that carries a digit) in eight colours and two sizes on a textured background with clutter. Every question names the
patches that hold its answer, as row-major indices into the 12 x 12 grid that the reference model sees, so a pruning
method can be compared with an oracle that knows where to look.

Seeds below `TRAIN_SEEDS` are held out: `refvlm.train` only ever draws seeds from there on.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from PIL import Image, ImageDraw

GRID = 12
SIZE = 288  # drawn at twice the model's 144 pixels, so that pictures still look good when shown to people
CELL = SIZE // GRID
TRAIN_SEEDS = 1_000_000

# The eight colours of easy-VQA, so that both kinds of pictures share one vocabulary.
COLORS: dict[str, tuple[int, int, int]] = {
    "black": (12, 12, 12),
    "gray": (128, 128, 128),
    "red": (235, 20, 20),
    "blue": (20, 30, 235),
    "green": (15, 215, 25),
    "yellow": (240, 235, 20),
    "teal": (10, 130, 130),
    "brown": (155, 60, 40),
}
SHAPES = ("circle", "rectangle", "triangle", "star", "cross", "sign")
SIZES = ("small", "big")
VERTICAL = ("top", "bottom")
HORIZONTAL = ("left", "right")
DIGITS = tuple("0123456789")
NUMBERS = ("zero", "one", "two", "three", "four", "five")
KINDS = ("color", "shape", "size", "position", "count", "presence", "digit")

# 5 x 7 dot matrix, one string of rows per digit: no font file, the same picture with every Pillow version.
_DOTS = (
    "01110 10001 10001 10001 10001 10001 01110",
    "00100 01100 00100 00100 00100 00100 01110",
    "01110 10001 00001 00110 01000 10000 11111",
    "11110 00001 00001 01110 00001 00001 11110",
    "10010 10010 10010 11111 00010 00010 00010",
    "11111 10000 10000 11110 00001 00001 11110",
    "00110 01000 10000 11110 10001 10001 01110",
    "11111 00001 00010 00010 00100 00100 00100",
    "01110 10001 10001 01110 10001 10001 01110",
    "01110 10001 10001 01111 00001 00010 01100",
)


@dataclass(frozen=True)
class Thing:
    """One object. Lengths are pixels of the 288 x 288 picture; `patches` starts with the most central patch."""

    shape: str
    color: str
    size: str
    digit: str | None
    x: int
    y: int
    half_width: int
    half_height: int
    rgb: tuple[int, int, int]
    patches: tuple[int, ...] = field(default=())

    @property
    def vertical(self) -> str:
        return VERTICAL[self.y > SIZE // 2]

    @property
    def horizontal(self) -> str:
        return HORIZONTAL[self.x > SIZE // 2]


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
    """A picture and what is in it; `image` and `questions` are made on first use."""

    seed: int
    objects: tuple[Thing, ...]

    @cached_property
    def image(self) -> Image.Image:
        return _draw(self.seed, self.objects)

    @cached_property
    def questions(self) -> tuple[Question, ...]:
        """At most one question of every kind, in the order of `KINDS`."""
        rng = random.Random(f"questions {self.seed}")
        asked = (ask(self.objects, kind, rng) for kind in KINDS)
        return tuple(question for question in asked if question is not None)


def scene(seed: int) -> Scene:
    """The scene of this seed: same seed, same picture and questions."""
    rng = random.Random(f"scene {seed}")
    wanted = rng.choice((2, 3, 3, 4, 4, 5))
    # Counting needs repetition: in most scenes some objects share their colour or their shape.
    shared = rng.choice((1, 2, 2, 3, 3, 3)) if wanted > 2 else rng.choice((1, 2))
    by_color = rng.random() < 0.5
    color, shape = rng.choice(tuple(COLORS)), rng.choice(SHAPES[:-1])
    things: list[Thing] = []
    with_sign = rng.random() < 0.75
    for index in range(wanted):
        if index < shared:
            mine = (color, rng.choice(SHAPES[:-1])) if by_color else (rng.choice(tuple(COLORS)), shape)
        else:
            mine = (rng.choice(tuple(COLORS)), rng.choice(SHAPES[:-1]))
        if index == wanted - 1 and with_sign:
            mine = (mine[0], "sign")
        thing = _place(rng, things, *mine)
        if thing is not None:
            things.append(thing)
    if with_sign and things[-1].shape != "sign":  # no room was left for it: the sign replaces the last object
        last = things.pop()
        things.append(_place(rng, things, last.color, "sign") or last)
    rng.shuffle(things)
    return Scene(seed, tuple(things))


def ask(objects: Sequence[Thing], kind: str, rng: random.Random) -> Question | None:
    """One random question of this kind about these objects, or None where no unambiguous one exists."""
    return _ASK[kind](objects, rng)


def caption(objects: Sequence[Thing]) -> str:
    """Every object in reading order of its centre patch: "big red star top left , ..."."""
    ordered = sorted(objects, key=lambda thing: thing.patches[0])
    return " , ".join(
        f"{t.size} {t.color} {t.shape} {t.digit or ''} {t.vertical} {t.horizontal}".replace("  ", " ") for t in ordered
    )


def interleave(objects: Sequence[Thing]) -> tuple[int, ...]:
    """The patches of several objects, the most central ones first, without repetition."""
    longest = max((len(thing.patches) for thing in objects), default=0)
    ranked = (t.patches[rank] for rank in range(longest) for t in objects if rank < len(t.patches))
    return tuple(dict.fromkeys(ranked))


# ---------------------------------------------------------------------------------------------------- questions


def _only(objects: Sequence[Thing], **want: str) -> bool:
    return sum(all(getattr(t, key) == value for key, value in want.items()) for t in objects) == 1


def _descriptions(objects: Sequence[Thing], hide: str = "") -> list[tuple[str, Thing]]:
    """Phrases that fit exactly one object and do not mention the attribute `hide`."""
    found = []
    for thing in objects:
        if hide != "shape" and _only(objects, shape=thing.shape):
            found.append((thing.shape, thing))
        if hide != "color" and _only(objects, color=thing.color):
            found.append((f"{thing.color} object", thing))
        if not hide and _only(objects, color=thing.color, shape=thing.shape):
            found += [(f"{thing.color} {thing.shape}", thing)] * 2
    return found


def _ask_color(objects: Sequence[Thing], rng: random.Random) -> Question | None:
    if not (options := _descriptions(objects, hide="color")):
        return None
    name, thing = rng.choice(options)
    text = rng.choice(("what color is the {}?", "what is the color of the {}?")).format(name)
    return Question(text, thing.color, "color", thing.patches)


def _ask_shape(objects: Sequence[Thing], rng: random.Random) -> Question | None:
    if not (options := _descriptions(objects, hide="shape")):
        return None
    weights = [0.5 if thing.shape == "sign" else 1.0 for _, thing in options]  # else "sign" would be a good guess
    _, thing = rng.choices(options, weights)[0]
    text = rng.choice(("what shape is the {} object?", "what is the {} shape?", "what is the {} object?"))
    return Question(text.format(thing.color), thing.shape, "shape", thing.patches)


def _ask_size(objects: Sequence[Thing], rng: random.Random) -> Question | None:
    if not (options := _descriptions(objects)):
        return None
    name, thing = rng.choice(options)
    text = rng.choice(("is the {} big or small?", "what size is the {}?")).format(name)
    return Question(text, thing.size, "size", thing.patches)


def _ask_position(objects: Sequence[Thing], rng: random.Random) -> Question | None:
    if not (options := _descriptions(objects)):
        return None
    name, thing = rng.choice(options)
    return Question(f"where is the {name}?", f"{thing.vertical} {thing.horizontal}", "position", thing.patches)


def _ask_count(objects: Sequence[Thing], rng: random.Random) -> Question | None:
    # Higher counts occur in fewer scenes, so they are preferred where they occur: answers come out about even.
    options: dict[int, list[tuple[str, list[Thing]]]] = {}
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


def _ask_presence(objects: Sequence[Thing], rng: random.Random) -> Question | None:
    yes = rng.random() < 0.5
    form = rng.choice(("color", "shape", "both", "both"))
    colors, shapes = {t.color for t in objects}, {t.shape for t in objects}
    if yes:
        thing = rng.choice(objects)
        color, shape = thing.color, thing.shape
    elif form == "both":
        # Mostly near misses: a colour and a shape that both occur, but on different objects.
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


def _ask_digit(objects: Sequence[Thing], rng: random.Random) -> Question | None:
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

# ------------------------------------------------------------------------------------------------------ drawing


def _place(rng: random.Random, others: Sequence[Thing], color: str, shape: str) -> Thing | None:
    """A new object at a free spot, clear of the middle lines so that its quadrant is never in doubt."""
    size = rng.choice(SIZES)
    radius = rng.randint(25, 29) if size == "small" else rng.randint(42, 48)
    if shape == "sign":
        radius = 34 if size == "small" else 46
    wide = high = radius
    if shape == "rectangle":
        if rng.random() < 0.5:
            wide = int(radius * rng.uniform(0.65, 1))
        else:
            high = int(radius * rng.uniform(0.65, 1))
    rgb = tuple(min(255, max(0, value + rng.randint(-18, 18))) for value in COLORS[color])
    digit = rng.choice(DIGITS) if shape == "sign" else None
    for _ in range(60):
        x, y = (rng.randint(radius + 4, SIZE - radius - 4) for _ in range(2))
        if shape == "sign":  # on half patches: reading a digit is hard enough for such a small model
            x, y = round(x / 12) * 12, round(y / 12) * 12
        clear = all(abs(x - t.x) > wide + t.half_width + 8 or abs(y - t.y) > high + t.half_height + 8 for t in others)
        if clear and min(abs(x - SIZE // 2), abs(y - SIZE // 2)) >= 16:
            thing = Thing(shape, color, size, digit, x, y, wide, high, rgb)  # type: ignore[arg-type]
            patches = _patches(thing)
            if not any(set(patches) & set(other.patches) for other in others):  # one patch, one object
                return dataclasses.replace(thing, patches=patches)
    return None


def _outline(thing: Thing) -> list[tuple[float, float]]:
    x, y, w, h = thing.x, thing.y, thing.half_width, thing.half_height
    if thing.shape == "triangle":
        return [(x, y - h), (x + w, y + h), (x - w, y + h)]
    if thing.shape == "cross":
        a = w * 0.36
        signs = ((-a, -w), (a, -w), (a, -a), (w, -a), (w, a), (a, a), (a, w), (-a, w), (-a, a), (-w, a), (-w, -a))
        return [(x + dx, y + dy) for dx, dy in (*signs, (-a, -a))]
    if thing.shape == "star":
        turns = [(math.pi * k / 5 - math.pi / 2, w if k % 2 == 0 else w * 0.45) for k in range(10)]
        return [(x + r * math.cos(turn), y + r * math.sin(turn)) for turn, r in turns]
    return [(x - w, y - h), (x + w, y - h), (x + w, y + h), (x - w, y + h)]


def _fill(draw: ImageDraw.ImageDraw, thing: Thing, color: int | tuple[int, int, int]) -> None:
    box = (
        thing.x - thing.half_width,
        thing.y - thing.half_height,
        thing.x + thing.half_width,
        thing.y + thing.half_height,
    )
    if thing.shape == "circle":
        draw.ellipse(box, fill=color)
    elif thing.shape == "sign":
        draw.rounded_rectangle(box, radius=8, fill=color)
    else:
        draw.polygon(_outline(thing), fill=color)


def _patches(thing: Thing) -> tuple[int, ...]:
    """Grid cells of which the object covers at least a fifth, the one at its centre of mass first."""
    mask = Image.new("L", (SIZE, SIZE))
    _fill(ImageDraw.Draw(mask), thing, 255)
    cover = np.asarray(mask, dtype=np.float32).reshape(GRID, CELL, GRID, CELL).mean((1, 3)).ravel() / 255
    center = min(thing.y // CELL, GRID - 1) * GRID + min(thing.x // CELL, GRID - 1)
    order = sorted(np.flatnonzero(cover >= 0.2).tolist(), key=lambda cell: (cell != center, -cover[cell], cell))
    return tuple(order) if order and order[0] == center else (center, *order)


def _background(seed: int) -> np.ndarray:
    """A light textured backdrop, float32 `[SIZE, SIZE, 3]`."""
    rng = np.random.RandomState(seed % 2**32)  # the legacy generator, because its stream never changes
    base = rng.randint(200, 250, 3).astype(np.float32)
    other = np.clip(base + rng.randint(-34, 34, 3), 180, 255).astype(np.float32)
    down, right = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) / SIZE
    kind, angle, period = rng.randint(6), rng.rand() * 2 * math.pi, rng.randint(4, 16)
    along = math.cos(angle) * right + math.sin(angle) * down
    if kind == 0:
        mix = np.zeros_like(along)
    elif kind == 1:
        mix = (along - along.min()) / (along.max() - along.min())
    elif kind == 2:
        mix = 0.5 + 0.5 * np.sin(2 * math.pi * period * along)
    elif kind == 3:
        mix = ((right * period).astype(int) + (down * period).astype(int)) % 2
    elif kind == 4:
        coarse = Image.fromarray((rng.rand(period * 2, period * 2) * 255).astype(np.uint8))
        mix = np.asarray(coarse.resize((SIZE, SIZE), Image.Resampling.BILINEAR), dtype=np.float32) / 255
    else:
        mix = ((right * period % 1 - 0.5) ** 2 + (down * period % 1 - 0.5) ** 2 < 0.06).astype(np.float32)
    picture = base + np.asarray(mix, dtype=np.float32)[..., None] * (other - base)
    return picture + rng.randint(-8, 9, (SIZE // 2, SIZE // 2, 1)).repeat(2, 0).repeat(2, 1)


def _draw(seed: int, objects: Sequence[Thing]) -> Image.Image:
    image = Image.fromarray(np.clip(_background(seed), 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    rng = random.Random(f"clutter {seed}")
    for _ in range(rng.randint(0, 5)):  # thin faint strokes: part of the picture, but no object
        x, y, turn, length = rng.randint(0, SIZE), rng.randint(0, SIZE), rng.random() * math.tau, rng.randint(20, 80)
        end = (x + length * math.cos(turn), y + length * math.sin(turn))
        shade = rng.randint(150, 190)
        draw.line((x, y, *end), fill=(shade, shade, rng.randint(150, 190)), width=3)
    for thing in objects:
        _fill(draw, thing, thing.rgb)
        if thing.digit:
            _write_digit(draw, thing)
    return image


def _write_digit(draw: ImageDraw.ImageDraw, sign: Thing) -> None:
    red, green, blue = sign.rgb
    ink = (0, 0, 0) if 0.3 * red + 0.59 * green + 0.11 * blue > 110 else (255, 255, 255)
    dot = sign.half_width * 1.56 / 7
    left, top = sign.x - 2.5 * dot, sign.y - 3.5 * dot
    for row, dots in enumerate(_DOTS[int(sign.digit or 0)].split()):
        for column, on in enumerate(dots):
            if on == "1":
                x, y = left + column * dot, top + row * dot
                draw.rectangle((round(x), round(y), round(x + dot) - 1, round(y + dot) - 1), fill=ink)
