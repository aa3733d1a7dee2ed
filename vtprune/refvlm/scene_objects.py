# SPDX-License-Identifier: Apache-2.0
"""Objects of scenes, and the words that describe them."""

from __future__ import annotations

from dataclasses import dataclass, field

GRID = 12
SIZE = 288  # drawn at twice the model's 144 pixels, so that pictures still look good when shown to people
CELL = SIZE // GRID

# The eight colors of easy-VQA, so that both kinds of pictures share one vocabulary.
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


@dataclass(frozen=True)
class SceneObject:
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
