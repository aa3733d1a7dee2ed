# SPDX-License-Identifier: Apache-2.0
"""Training batches of five kinds: scenes at many sizes, crowds, pages, pairs of pictures and clips.

Every batch holds one kind at one size, without padding; its number of rows follows from the tokens per row.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from PIL import Image

from tools.packing import IGNORE, Dialogue, pack_questions
from tools.refvlm.data import GROUPS as SCENE_GROUPS
from tools.refvlm.data import describe, small
from vtprune.refvlm import clips, crowds, easy_vqa, pages, scenes

from .build import CELL, VOCABULARY, tokenizer

TEXT = 112  # text positions per row: eight to ten questions
GROUPS: dict[str, tuple[str, ...]] = {
    **SCENE_GROUPS,
    "word": pages.WORDS,
    "line": scenes.DIGITS,
    "order": pages.ORDER,
}
NAMES = list(GROUPS)
KINDS = {"scene": 0.16, "crowd": 0.12, "page": 0.54, "pair": 0.06, "clip": 0.12}
# Grids (rows, columns) of visual tokens and their sampling weights; large pictures are rare.
SIZES: dict[str, dict[tuple[int, int], float]] = {
    "scene": {
        (4, 4): 1, (5, 5): 2, (6, 6): 3, (6, 8): 1, (8, 6): 1, (7, 7): 2, (8, 8): 3, (9, 9): 3, (10, 10): 3,
        (12, 12): 5, (9, 12): 1, (12, 9): 1, (10, 14): 1, (14, 10): 1, (16, 16): 2, (20, 20): 1, (24, 24): 1,
        (36, 36): 0.3,
    },
    "crowd": {
        (12, 12): 4, (12, 16): 2, (16, 12): 2, (16, 16): 4, (14, 18): 2, (20, 20): 2, (24, 18): 1, (24, 24): 1,
        (28, 36): 0.3, (36, 36): 0.6,
    },
    "page": {
        (8, 8): 3, (8, 10): 2, (10, 10): 3, (12, 12): 4, (16, 12): 3, (14, 14): 3, (18, 14): 2, (20, 20): 2,
        (24, 18): 1, (28, 24): 0.5, (36, 36): 0.5,
    },
    "pair": {(6, 6): 2, (8, 8): 3, (9, 9): 2, (12, 12): 3, (16, 16): 0.7},
    "clip": {(5, 5): 2, (6, 6): 3, (6, 8): 1, (8, 6): 1, (7, 7): 2, (8, 8): 2, (9, 9): 1},
}  # fmt: skip
MORE = {"line": 3, "word": 2, "which line": 1, "page presence": 1}  # questions about a page, beyond one of each kind
# A page has fewer lines than its grid has rows. The pages of phase 4 grow from two lines to seven.
SHORT = (((3, 8), (3, 10)), ((3, 8), (4, 8), (4, 10)), ((4, 8), (5, 10), (6, 10)), ((5, 10), (6, 10), (8, 8), (8, 10)))


@dataclass
class Row:
    """One training example.

    Attributes:
        frames: uint8 `[pictures, H, W, 3]`, or `[2 * steps, H, W, 3]` of a clip.
        cells: int8 `[visual tokens, len(GROUPS)]`, word labels of each visual token.
        asked: questions with their answers.
    """

    frames: np.ndarray
    cells: np.ndarray
    asked: list[Dialogue]


@dataclass
class Batch:
    """Rows as tensors; `grids` holds time steps, rows and columns of each picture of a row, in visual tokens."""

    kind: str
    grids: tuple[tuple[int, int, int], ...]
    patches: torch.Tensor  # uint8 [rows * pictures * steps * H/6 * W/6, 216]
    cells: torch.Tensor  # int64 [rows, visual tokens, groups]
    tokens: torch.Tensor
    labels: torch.Tensor
    segments: torch.Tensor
    positions: torch.Tensor
    asked: list[list[Dialogue]]

    @property
    def visual(self) -> int:
        return sum(time * rows * columns for time, rows, columns in self.grids)


@lru_cache(maxsize=1)
def _tokenizer():
    return tokenizer()


@lru_cache(maxsize=200_000)
def encode(text: str) -> tuple[int, ...]:
    ids = tuple(_tokenizer()(text, add_special_tokens=False)["input_ids"])
    if VOCABULARY["<unk>"] in ids:
        raise ValueError(f"unknown word in {text!r}")
    return ids


def blank(count: int) -> np.ndarray:
    """Labels of visual tokens of the background, int8 `[count, len(GROUPS)]`."""
    table = np.array([[len(words) for words in GROUPS.values()]] * count, dtype=np.int8)
    table[:, NAMES.index("background")] = 0
    return table


def object_cells(objects, count: int, offset: int = 0, table: np.ndarray | None = None) -> np.ndarray:
    """Labels of visual tokens for `objects`; all tokens of an object have the labels of the whole object."""
    table = blank(count) if table is None else table
    for item in objects:
        cells = [offset + cell for cell in item.patches]
        for column, (group, words) in enumerate(GROUPS.items()):
            if group == "center":
                table[cells[0], column] = 0
            elif group == "background":
                table[cells, column] = 1
            elif group not in ("word", "line", "order") and (word := getattr(item, group)) is not None:
                table[cells, column] = words.index(word) if word else IGNORE
    return table


def page_cells(page: pages.Page) -> np.ndarray:
    table = blank(page.grid[0] * page.grid[1])
    for word in page.words:
        cells = list(word.patches)
        table[cells, NAMES.index("background")] = 1
        table[cells, NAMES.index("line")] = word.line
        if word.place >= 0:
            # A token between two words is labeled with the earlier one, of which it shows more letters.
            free = [cell for cell in cells if table[cell, NAMES.index("word")] == len(pages.WORDS)]
            table[free, NAMES.index("word")] = pages.WORDS.index(word.text)
            table[free, NAMES.index("order")] = word.place
    return table


def fitted(image: np.ndarray | Image.Image, grid: tuple[int, int]) -> np.ndarray:
    """The picture resized to `grid`, uint8 `[H, W, 3]`."""
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    wanted = (grid[1] * CELL, grid[0] * CELL)
    return np.asarray(image if image.size == wanted else image.resize(wanted, Image.Resampling.BICUBIC))


def regrid(cells: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Labels of the 12 x 12 tokens of a scene at another grid, by the center of every new token."""
    rows, columns = (((np.arange(side) + 0.5) * scenes.GRID // side).astype(int) for side in grid)
    return cells.reshape(scenes.GRID, scenes.GRID, -1)[rows[:, None], columns].reshape(grid[0] * grid[1], -1)


def ask_scene(objects, rng: random.Random, captions: float, size: bool = True) -> list[Dialogue]:
    """Questions of every kind about objects, most of the two kinds learned last; sometimes with the caption."""
    kinds = [*scenes.KINDS, *["size"] * size, "position", *["count"] * 3, *["presence"] * 3]
    rng.shuffle(kinds)
    found = (scenes.ask(objects, kind, rng) for kind in kinds if size or kind != "size")
    asked = list(dict.fromkeys((q.kind, q.text, q.answer) for q in found if q is not None))
    if len(objects) <= 5 and size and rng.random() < captions:
        asked.insert(0, ("caption", "describe the image", scenes.caption(objects)))
    return asked


def ask_pair(first, second, rng: random.Random) -> list[Dialogue]:
    """Questions about one of two pictures, and about which of them shows an object."""
    asked: list[Dialogue] = []
    for _ in range(10):
        number = rng.randrange(2)
        mine, other = (first, second)[number], (first, second)[1 - number]
        if rng.random() < 0.3:
            item = rng.choice(mine)
            form = rng.choice(("shape", "both"))
            name = item.shape if form == "shape" else f"{item.color} {item.shape}"
            same = [o for o in other if o.shape == item.shape and (form == "shape" or o.color == item.color)]
            if not same:
                asked.append(("which image", f"which image has a {name}?", pages.ORDER[number]))
            continue
        question = scenes.ask(mine, rng.choice(("color", "shape", "position", "count", "presence", "digit")), rng)
        if question is not None:
            text = (
                question.text.removesuffix("?").removesuffix(" in the image") + f" in the {pages.ORDER[number]} image?"
            )
            if not text.startswith("does"):
                asked.append((f"pair {question.kind}", text, question.answer))
    return list(dict.fromkeys(asked))


class Source:
    """Draws training rows, deterministic in the step, so that resumed runs see the same rows.

    Args:
        seed: seed of the run; its pictures have seeds from `scenes.TRAIN_SEEDS` on.
        pool: scenes and backgrounds in memory; one of them is replaced every `turn` steps.
    """

    def __init__(self, seed: int = 0, pool: int = 900, easy: bool = True):
        self.seed = seed
        self.base = scenes.TRAIN_SEEDS * (1 + seed)
        drawn = [scenes.scene(self.base + number) for number in range(pool)]
        self.scenes = [(np.asarray(scene.image), scene.objects) for scene in drawn]
        self.backgrounds = [crowds.backdrop(self.base + number, (24, 24)) for number in range(150)]
        self.easy: list[tuple[np.ndarray, tuple, list[Dialogue]]] = []
        if easy:
            self._load_easy()

    def _load_easy(self) -> None:
        questions: dict[int, list[Dialogue]] = {}
        for sample in easy_vqa.samples("train"):
            questions.setdefault(sample.image_id, []).append((f"easy {sample.kind}", sample.question, sample.answer))
        for image_id, path in sorted(easy_vqa.image_paths("train").items())[:600]:
            if image_id in questions:
                with Image.open(path) as file:
                    image = file.convert("RGB")
                self.easy.append((np.asarray(image), describe(small(image)), questions[image_id]))

    def _scene(self, rng: random.Random):
        return rng.choice(self.scenes)

    def row(
        self, kind: str, grid: tuple[int, int], steps: int, rng: random.Random, captions: float, find: bool = False
    ) -> Row:
        """One row; with `find`, questions about a page mostly ask where a word is, or whether it is there."""
        count = grid[0] * grid[1]
        seed = self.base + rng.randrange(10**8)
        if kind == "scene" and self.easy and rng.random() < 0.12 and grid[0] >= 5:
            image, objects, questions = rng.choice(self.easy)
            asked = rng.sample(questions, len(questions))
            return Row(fitted(image, grid)[None], regrid(object_cells(objects, 144), grid), asked)
        if kind == "scene":
            image, objects = self._scene(rng)
            cells = regrid(object_cells(objects, scenes.GRID**2), grid)
            return Row(fitted(image, grid)[None], cells, ask_scene(objects, rng, captions))
        if kind == "crowd":
            drawn = crowds.crowd(seed, grid)
            background = self._background(rng, grid)
            image = np.asarray(crowds.draw(drawn.objects, grid, background))
            return Row(image[None], object_cells(drawn.objects, count), ask_scene(drawn.objects, rng, 0.0, size=False))
        if kind == "page":
            page = pages.page(seed, grid)
            more = {"line": 1, "word": 2, "which line": 3, "page presence": 6} if find else MORE
            kinds = [*pages.KINDS, *(kind for kind, times in more.items() for _ in range(times))]
            rng.shuffle(kinds)
            questions = (pages.ask(page, kind, rng) for kind in kinds)
            asked = list(dict.fromkeys((q.kind, q.text, q.answer) for q in questions if q is not None))
            return Row(np.asarray(page.image)[None], page_cells(page), asked)
        if kind == "pair":
            pair = [self._scene(rng) for _ in range(2)]
            cells = [regrid(object_cells(objects, scenes.GRID**2), grid) for _, objects in pair]
            frames = np.stack([fitted(image, grid) for image, _ in pair])
            return Row(frames, np.concatenate(cells), ask_pair(pair[0][1], pair[1][1], rng))
        clip = clips.clip(seed, grid, steps)
        plain = self._background(rng, grid)
        table = blank(count * steps)
        for step, shown in enumerate(clip.steps):
            object_cells(shown, count, step * count, table)
        frames = [np.asarray(crowds.draw(shown, grid, plain)) for shown in clip.steps]
        asked = [(q.kind, q.text, q.answer) for q in clip.questions]
        return Row(np.stack([frame for frame in frames for _ in range(clips.FRAMES)]), table, asked)

    def _background(self, rng: random.Random, grid: tuple[int, int]) -> Image.Image:
        return rng.choice(self.backgrounds).resize((grid[1] * CELL, grid[0] * CELL), Image.Resampling.BILINEAR)

    def batch(self, step: int, part: int, budget: int, captions: float, text: bool = True, find: bool = False) -> Batch:
        """Rows of one kind and size with about `budget` tokens, deterministic in `step` and `part`."""
        rng = random.Random(f"{self.seed} {step} {part}")
        kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
        grid = rng.choices(list(SIZES[kind]), list(SIZES[kind].values()))[0]
        steps = rng.choice((3, 4, 4, 5))
        layers = steps if kind == "clip" else 2 if kind == "pair" else 1
        tokens = grid[0] * grid[1] * layers + TEXT * text
        rows = [self.row(kind, grid, steps, rng, captions, find) for _ in range(max(1, round(budget / tokens)))]
        return pack(kind, rows, grid, steps)

    def short_pages(self, step: int, budget: int, stage: int) -> Batch:
        """Pages of one size of `SHORT[stage]`, with questions that have to find a word."""
        rng = random.Random(f"{self.seed} {step} short")
        grid = rng.choice(SHORT[stage])
        count = round(budget / (grid[0] * grid[1] + TEXT))
        return pack("page", [self.row("page", grid, 1, rng, 0.0, True) for _ in range(count)], grid, 1)


def held_out(kind: str, grid: tuple[int, int], count: int, seed: int = 0) -> Batch:
    """Rows that training never draws, with seeds below `scenes.TRAIN_SEEDS`."""
    source = Source.__new__(Source)
    source.seed, source.base, source.easy = seed, -(10**9) - seed, []
    drawn = [scenes.scene(900_000 + seed + number) for number in range(60)]
    source.scenes = [(np.asarray(scene.image), scene.objects) for scene in drawn]
    source.backgrounds = [crowds.backdrop(900_000 + number, (24, 24)) for number in range(20)]
    rng = random.Random(f"held out {kind} {grid} {seed}")
    return pack(kind, [source.row(kind, grid, 4, rng, 0.0) for _ in range(count)], grid, 4)


def flatten(frames: np.ndarray) -> np.ndarray:
    """Frames in the layout of Qwen's image processor: patch by patch, the patches of one visual token adjacent.

    Args:
        frames: uint8 `[layers, 2, H, W, 3]`.

    Returns:
        uint8 `[layers * H/6 * W/6, 3 * 2 * 6 * 6]`.
    """
    layers, two, height, width, channels = frames.shape
    cut = frames.reshape(layers, two, height // CELL, 2, 6, width // CELL, 2, 6, channels)
    return cut.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(-1, channels * two * 36)


def pack(kind: str, rows: list[Row], grid: tuple[int, int], steps: int) -> Batch:
    """Converts rows to tensors, with as many of their questions as fit."""
    packed = pack_questions([row.asked for row in rows], encode, VOCABULARY["<eos>"], TEXT)
    frames = np.stack([row.frames for row in rows])
    if kind == "clip":
        grids = ((steps, *grid),)
        frames = frames.reshape(len(rows) * steps, 2, *frames.shape[2:])
    else:
        grids = ((1, *grid),) * frames.shape[1]
        frames = np.repeat(frames.reshape(-1, 1, *frames.shape[2:]), 2, axis=1)
    return Batch(
        kind, grids, torch.from_numpy(flatten(frames)), torch.from_numpy(np.stack([row.cells for row in rows])).long(),
        *packed,
    )  # fmt: skip
