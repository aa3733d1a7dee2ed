# SPDX-License-Identifier: Apache-2.0
"""Training batches: pictures of one size, several questions behind each, and what every patch shows."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from torch import Tensor

from benchmarks.real import drawn, parts, photo_vlm
from tools.packing import Dialogue, pack_questions
from tools.refvlm.qwen2_5_vl.data import GROUPS, object_cells, page_cells
from vtprune.refvlm import pages, scenes

TEXT = 160  # text positions per picture: about thirteen questions
KINDS = {"scene": 0.7, "crowd": 0.12, "page": 0.18}
# Patches in each direction with their weights: small pictures most of the time. Letters need 16 patches and more.
GRIDS: dict[str, dict[int, float]] = {
    "scene": {12: 5.0, 14: 2.0, 16: 3.0, 20: 0.6, 24: 0.4, 32: 0.15},
    "crowd": {12: 2.0, 16: 3.0, 20: 1.0, 24: 0.5, 32: 0.2},
    "page": {16: 2.0, 20: 2.0, 24: 1.0, 32: 0.2},
}
# Of the questions about objects; what only needs one object to be found is learned first.
ASKED = (*("color", "shape", "size", "position", "digit", "count") * 2, *["presence"] * 3)
LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")
# The words that describe what a patch shows, at most one of each group.
SHOWN: dict[str, tuple[str, ...]] = {
    **{group: words for group, words in GROUPS.items() if group not in ("center", "word", "order")},
    "letter": LETTERS,
}


@dataclass
class Batch:
    """Pictures and packed questions.

    Attributes:
        pixels: float32 `[B, 3, H, W]`.
        tokens: int64 `[B, TEXT]`, several questions with their answers.
        labels: int64 `[B, TEXT]`, the token to predict at each position, or `IGNORE`.
        segments: int64 `[B, TEXT]`, number of the question, 0 for padding.
        positions: int64 `[B, TEXT]`, places after the picture, as if each question stood there alone.
        asked: per picture, the questions that fitted, in the order of `segments`.
    """

    pixels: Tensor
    tokens: Tensor
    labels: Tensor
    segments: Tensor
    positions: Tensor
    asked: list[list[Dialogue]]


@lru_cache(maxsize=200_000)
def encode(text: str) -> tuple[int, ...]:
    return tuple(parts.tokenizer()(text, add_special_tokens=False)["input_ids"])


def cells(picture: drawn.Picture) -> np.ndarray:
    """The word of every group of words that each patch shows, int8 `[grid * grid, len(GROUPS)]`."""
    if picture.kind == "crowd":
        return object_cells(picture.drawn.objects, picture.grid**2)
    table = page_cells(picture.drawn) if picture.kind == "page" else object_cells(picture.drawn.objects, scenes.GRID**2)
    side = drawn.PAGE[0] if picture.kind == "page" else scenes.GRID
    middles = ((np.arange(picture.grid) + 0.5) * side / picture.grid).astype(int)
    return table.reshape(side, side, -1)[middles[:, None], middles].reshape(picture.grid**2, -1)


def letters(picture: drawn.Picture) -> np.ndarray:
    """Which letter each patch shows, the one at its middle: int8 `[grid * grid]`, `len(LETTERS)` for none."""
    found = np.full((picture.grid, picture.grid), len(LETTERS), dtype=np.int8)
    if picture.kind == "page":
        middles = (np.arange(picture.grid) + 0.5) * drawn.PAGE[0] * pages.CELL / picture.grid
        for word in picture.drawn.words:
            top, left = word.corner
            for row in np.flatnonzero((middles >= top - 1) & (middles < top + pages.HIGH + 1)):
                for column in np.flatnonzero((middles >= left) & (middles < left + pages.ADVANCE * len(word.text))):
                    letter = word.text[int(middles[column] - left) // pages.ADVANCE]
                    found[row, column] = LETTERS.index(letter) if letter in LETTERS else len(LETTERS)
    return found.ravel()


def patch_labels(picture: drawn.Picture) -> np.ndarray:
    """The word of every group in `SHOWN` that each patch shows, int8 `[grid * grid, len(SHOWN)]`; others mean none."""
    table = cells(picture)[:, [list(GROUPS).index(group) for group in SHOWN if group != "letter"]]
    return np.concatenate((table, letters(picture)[:, None]), axis=1)


def patch_words(labels: np.ndarray) -> list[tuple[str, ...]]:
    """The words that describe each patch, such as ("red", "star", "big", "top", "left"), from `patch_labels`."""
    return [
        tuple(words[index] for index, words in zip(row, SHOWN.values(), strict=True) if 0 <= index < len(words))
        for row in labels.tolist()
    ]


def ask(picture: drawn.Picture, rng: random.Random, captions: float) -> list[Dialogue]:
    """Questions of every kind about a picture, in random order; sometimes its description first."""
    if picture.kind == "page":
        kinds = [*pages.KINDS, "line", "line", "word", "word", "word", "which line", "page presence", "page presence"]
        rng.shuffle(kinds)
        found = (pages.ask(picture.drawn, kind, rng) for kind in kinds)
        return list(dict.fromkeys((q.kind, q.text, q.answer) for q in found if q is not None))
    objects = picture.drawn.objects
    wanted = [kind for kind in ASKED if kind != "size" or picture.kind == "scene"]
    rng.shuffle(wanted)
    found = (scenes.ask(objects, kind, rng) for kind in wanted)
    asked = list(dict.fromkeys((q.kind, q.text, q.answer) for q in found if q is not None))
    if picture.kind == "scene" and rng.random() < captions:
        asked.insert(0, ("caption", "describe the image", scenes.caption(objects)))
    return asked


def batch(
    seed: int, step: int, budget: int, captions: float, scenes_only: bool = False, any_size: bool = False
) -> Batch:
    """Pictures of one kind and size, about `budget` tokens; the same arguments always give the same batch.

    With `any_size`, all sizes of a kind are equally frequent.
    """
    rng = random.Random(f"real {seed} {step}")
    kind = "scene" if scenes_only else rng.choices(list(KINDS), list(KINDS.values()))[0]
    grid = rng.choices(list(GRIDS[kind]), None if any_size else list(GRIDS[kind].values()))[0]
    seeds = [
        scenes.TRAIN_SEEDS * (1 + seed) + rng.randrange(10**8) for _ in range(round(budget / (grid**2 + TEXT)) or 1)
    ]
    chosen = [drawn.picture(kind, number, grid) for number in seeds]
    return pack([(picture, ask(picture, rng, captions)) for picture in chosen])


def held_out(kind: str, grid: int, count: int) -> Batch:
    """Pictures that neither training nor the final evaluation draws, on held-out photographs."""
    rng = random.Random(f"real held out {kind} {grid}")
    chosen = [drawn.picture(kind, 900_000 + number, grid) for number in range(count)]
    return pack([(picture, ask(picture, rng, 0.0)) for picture in chosen])


def pack(rows: list[tuple[drawn.Picture, list[Dialogue]]]) -> Batch:
    """Pictures of one size, and as many of their questions as fit, to tensors."""
    end = parts.tokenizer().eos_token_id
    packed = pack_questions([asked for _, asked in rows], lambda text: encode(f" {text}"), end, TEXT)
    pixels = photo_vlm.pixels([picture.image for picture, _ in rows])
    return Batch(pixels, *packed)
