# SPDX-License-Identifier: Apache-2.0
"""Seeded pages of numbered lines of text, and questions whose answer tokens are known.

A page of any size holds up to nine lines of one to three short words, written in a 5 x 7 dot font, one character in 6
pixels. Every line begins with its number, as in a listing.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image

from .scenes import Question

CELL = 12  # pixels of one visual token in each direction
WORDS = (
    "cat", "dog", "sun", "moon", "fish", "bird", "tree", "book", "milk", "cake", "lamp", "door",
    "rain", "snow", "ship", "frog", "bear", "lion", "rose", "king", "ring", "coin", "leaf", "wolf",
)  # fmt: skip
ORDER = ("first", "second", "third")
KINDS = ("line", "word", "which line", "lines", "page presence")
GRIDS = ((8, 8), (8, 10), (10, 10), (12, 12), (16, 12), (14, 14), (18, 14), (20, 20), (24, 18), (28, 24), (36, 36))
ADVANCE, HIGH = 6, 7  # pixels from one character to the next, and of a character's height
# Seven rows of five bits per character, as one hexadecimal number a row.
_FONT = {
    "a": "0E11111F111111", "b": "1E11111E11111E", "c": "0E11101010110E", "d": "1E11111111111E", "e": "1F10101E10101F",
    "f": "1F10101E101010", "g": "0E11101713110F", "h": "1111111F111111", "i": "0E04040404040E", "j": "0702020202120C",
    "k": "11121418141211", "l": "1010101010101F", "m": "111B1515111111", "n": "11191513111111", "o": "0E11111111110E",
    "p": "1E11111E101010", "q": "0E11111115120D", "r": "1E11111E141211", "s": "0F10100E01011E", "t": "1F040404040404",
    "u": "1111111111110E", "v": "11111111110A04", "w": "11111115151B11", "x": "11110A040A1111", "y": "11110A04040404",
    "z": "1F01020408101F", "0": "0E11131519110E", "1": "040C040404040E", "2": "0E11010608101F", "3": "1F01010E01111E",
    "4": "12121F02020202", "5": "1F10101E01111E", "6": "0E10101E11110E", "7": "1F010204080808", "8": "0E11110E11110E",
    "9": "0E11110F01010E",
}  # fmt: skip


@dataclass(frozen=True)
class Word:
    """One word of a page; `patches` are the visual tokens that its letters touch, in reading order."""

    text: str
    line: int  # from 1
    place: int  # in its line, from 0; the number of a line has -1
    patches: tuple[int, ...]
    corner: tuple[int, int]  # top and left of its first letter, in pixels


@dataclass(frozen=True)
class Page:
    """A page and its words; `image` is drawn on first use."""

    seed: int
    grid: tuple[int, int]
    words: tuple[Word, ...]
    drawn: np.ndarray  # bool [height, width], where there is ink

    @property
    def lines(self) -> tuple[tuple[Word, ...], ...]:
        """The words of every line, without its number."""
        count = max(word.line for word in self.words)
        return tuple(
            tuple(word for word in self.words if word.line == number and word.place >= 0)
            for number in range(1, count + 1)
        )

    @cached_property
    def image(self) -> Image.Image:
        rng = np.random.RandomState(self.seed % 2**32)
        paper, ink = rng.randint(205, 256, 3), rng.randint(0, 70, 3)
        pixels = np.where(self.drawn[..., None], ink, paper) + rng.randint(-8, 9, (*self.drawn.shape, 1))
        return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))

    @cached_property
    def questions(self) -> tuple[Question, ...]:
        """At most one question of every kind, in the order of `KINDS`."""
        rng = random.Random(f"page questions {self.seed}")
        asked = (ask(self, kind, rng) for kind in KINDS)
        return tuple(question for question in asked if question is not None)


def glyph(character: str) -> np.ndarray:
    """Bool `[7, 5]`, the dots of one character."""
    rows = bytes.fromhex(_FONT[character])
    return np.unpackbits(np.frombuffer(rows, np.uint8)[:, None], axis=1)[:, 3:].astype(bool)


def page(seed: int, grid: tuple[int, int] | None = None) -> Page:
    """Creates the page of a seed.

    Args:
        seed: the same seed and grid give the same page and questions.
        grid: rows and columns of visual tokens; one of `GRIDS` by default.
    """
    rng = random.Random(f"page {seed}")
    rows, columns = grid = grid or rng.choice(GRIDS)
    ink = np.zeros((rows * CELL, columns * CELL), dtype=bool)
    count = rng.randint(2, min(9, rows - 1))
    pitch = rng.randint(CELL, max(CELL, min(3 * CELL, (rows * CELL - 4) // count)))
    top, left = rng.randint(2, rows * CELL - pitch * (count - 1) - HIGH - 2), rng.randint(2, 8)
    words: list[Word] = []
    for number in range(1, count + 1):
        y, x = top + (number - 1) * pitch, left
        texts = [str(number), *rng.sample(WORDS, rng.choice((1, 2, 2, 3)))]
        for place, text in enumerate(texts, start=-1):
            width = ADVANCE * len(text)
            if place > 0 and x + width > columns * CELL:
                break
            for index, character in enumerate(text):
                start = x + index * ADVANCE
                ink[y : y + HIGH, start : start + 5] |= glyph(character)[:, : max(0, columns * CELL - start)]
            cells = [
                row * columns + column
                for row in range(y // CELL, (y + HIGH - 1) // CELL + 1)
                for column in range(x // CELL, (x + width - 2) // CELL + 1)
                if ink[max(y, row * CELL) : (row + 1) * CELL, max(x, column * CELL) : (column + 1) * CELL][:HIGH].any()
            ]
            words.append(Word(text, number, place, tuple(cells), (y, x)))
            x += width + rng.randint(ADVANCE, 2 * ADVANCE)
    return Page(seed, grid, tuple(words), ink)


def ask(on: Page, kind: str, rng: random.Random) -> Question | None:
    """One random question of this kind about a page, or None where no unambiguous one exists."""
    lines = on.lines
    number = rng.randrange(len(lines))
    mark = next(word for word in on.words if word.line == number + 1 and word.place == -1)
    line = lines[number]
    if kind == "line":
        text = " ".join(word.text for word in line)
        return Question(f"what does line {number + 1} say?", text, kind, cells(line, (mark,)))
    if kind == "word":
        word = rng.choice(line)
        text = f"what is the {ORDER[word.place]} word of line {number + 1}?"
        return Question(text, word.text, kind, cells((word,), (mark,)))
    if kind == "lines":
        marks = tuple(word for word in on.words if word.place == -1)
        return Question("how many lines are there?", str(len(lines)), kind, cells(marks))
    written = [word for line in lines for word in line]
    if kind == "which line":
        once = [word for word in written if sum(word.text == other.text for other in written) == 1]
        if not once:
            return None
        word = rng.choice(once)
        mark = next(other for other in on.words if other.line == word.line and other.place == -1)
        return Question(f"which line says {word.text}?", str(word.line), kind, cells((word,), (mark,)))
    texts = {word.text for word in written}
    if rng.random() < 0.5:
        word = rng.choice(written)
        same = tuple(other for other in written if other.text == word.text)
        return Question(f"does the page say {word.text}?", "yes", kind, cells(same))
    absent = rng.choice([word for word in WORDS if word not in texts] or [""])
    if not absent:
        return None
    return Question(f"does the page say {absent}?", "no", kind, cells(tuple(written)))


def cells(*groups: tuple[Word, ...]) -> tuple[int, ...]:
    """The visual tokens of several words, without repetition."""
    return tuple(dict.fromkeys(cell for group in groups for word in group for cell in word.patches))
