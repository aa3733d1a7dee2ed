# SPDX-License-Identifier: Apache-2.0
"""Places objects into a scene, finds the patches that they cover, and draws them."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from .scene_objects import CELL, COLORS, DIGITS, GRID, SIZE, SIZES, SceneObject

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


def place(rng: random.Random, others: Sequence[SceneObject], color: str, shape: str) -> SceneObject | None:
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
            item = SceneObject(shape, color, size, digit, x, y, wide, high, rgb)  # type: ignore[arg-type]
            patches = _patches(item)
            if not any(set(patches) & set(other.patches) for other in others):  # one patch, one object
                return dataclasses.replace(item, patches=patches)
    return None


def _outline(item: SceneObject) -> list[tuple[float, float]]:
    x, y, w, h = item.x, item.y, item.half_width, item.half_height
    if item.shape == "triangle":
        return [(x, y - h), (x + w, y + h), (x - w, y + h)]
    if item.shape == "cross":
        a = w * 0.36
        signs = ((-a, -w), (a, -w), (a, -a), (w, -a), (w, a), (a, a), (a, w), (-a, w), (-a, a), (-w, a), (-w, -a))
        return [(x + dx, y + dy) for dx, dy in (*signs, (-a, -a))]
    if item.shape == "star":
        turns = [(math.pi * k / 5 - math.pi / 2, w if k % 2 == 0 else w * 0.45) for k in range(10)]
        return [(x + r * math.cos(turn), y + r * math.sin(turn)) for turn, r in turns]
    return [(x - w, y - h), (x + w, y - h), (x + w, y + h), (x - w, y + h)]


def _fill(draw: ImageDraw.ImageDraw, item: SceneObject, color: int | tuple[int, int, int]) -> None:
    box = (
        item.x - item.half_width,
        item.y - item.half_height,
        item.x + item.half_width,
        item.y + item.half_height,
    )
    if item.shape == "circle":
        draw.ellipse(box, fill=color)
    elif item.shape == "sign":
        draw.rounded_rectangle(box, radius=8, fill=color)
    else:
        draw.polygon(_outline(item), fill=color)


def _patches(item: SceneObject) -> tuple[int, ...]:
    """Grid cells of which the object covers at least a fifth, the one at its center of mass first."""
    mask = Image.new("L", (SIZE, SIZE))
    _fill(ImageDraw.Draw(mask), item, 255)
    cover = np.asarray(mask, dtype=np.float32).reshape(GRID, CELL, GRID, CELL).mean((1, 3)).ravel() / 255
    center = min(item.y // CELL, GRID - 1) * GRID + min(item.x // CELL, GRID - 1)
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


def draw_scene(seed: int, objects: Sequence[SceneObject]) -> Image.Image:
    image = Image.fromarray(np.clip(_background(seed), 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    rng = random.Random(f"clutter {seed}")
    for _ in range(rng.randint(0, 5)):  # thin faint strokes: part of the picture, but no object
        x, y, turn, length = rng.randint(0, SIZE), rng.randint(0, SIZE), rng.random() * math.tau, rng.randint(20, 80)
        end = (x + length * math.cos(turn), y + length * math.sin(turn))
        shade = rng.randint(150, 190)
        draw.line((x, y, *end), fill=(shade, shade, rng.randint(150, 190)), width=3)
    for item in objects:
        _fill(draw, item, item.rgb)
        if item.digit:
            _write_digit(draw, item)
    return image


def _write_digit(draw: ImageDraw.ImageDraw, sign: SceneObject) -> None:
    red, green, blue = sign.rgb
    ink = (0, 0, 0) if 0.3 * red + 0.59 * green + 0.11 * blue > 110 else (255, 255, 255)
    dot = sign.half_width * 1.56 / 7
    left, top = sign.x - 2.5 * dot, sign.y - 3.5 * dot
    for row, dots in enumerate(_DOTS[int(sign.digit or 0)].split()):
        for column, on in enumerate(dots):
            if on == "1":
                x, y = left + column * dot, top + row * dot
                draw.rectangle((round(x), round(y), round(x + dot) - 1, round(y + dot) - 1), fill=ink)
