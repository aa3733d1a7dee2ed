# SPDX-License-Identifier: Apache-2.0
"""Training batches: a sliding pool of scenes, easy-VQA pictures, packed questions, and word labels of each patch."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from PIL import Image

from tools.packing import IGNORE, Dialogue, pack_questions
from tools.refvlm import model
from vtprune.refvlm import IMAGE_SIZE, VISUAL_TOKENS, easy_vqa, scenes

TEXT = 144  # text columns per picture: about eleven questions
# Word groups; every patch has one word of each group, or none.
GROUPS: dict[str, tuple[str, ...]] = {
    "color": tuple(scenes.COLORS),
    "shape": scenes.SHAPES,
    "size": scenes.SIZES,
    "vertical": scenes.VERTICAL,
    "horizontal": scenes.HORIZONTAL,
    "digit": scenes.DIGITS,
    "center": ("center",),
    "background": ("background",),
}
PRESENT = (*scenes.COLORS, *scenes.SHAPES, *scenes.DIGITS)  # labels of the class token

SQUARE = (IMAGE_SIZE, IMAGE_SIZE)
Sizes = tuple[tuple[int, int], ...]  # height and width in pixels


@dataclass
class Batch:
    """One optimizer step of one worker.

    Attributes:
        images: uint8 `[B, H, W, 3]`.
        patches: int64 `[B, N, len(GROUPS)]`, index of the word, `len(words)` for none, or `IGNORE`.
        present: float32 `[B, len(PRESENT)]`.
        tokens: int64 `[B, TEXT]`, several questions with their answers.
        labels: int64 `[B, TEXT]`, the token to predict at each column, or `IGNORE`.
        segments: int64 `[B, TEXT]`, number of the question, 0 for padding.
        positions: int64 `[B, TEXT]`, columns after the picture, counted for each question separately.
        asked: per picture, its packed questions in the order of `segments`.
    """

    images: torch.Tensor
    patches: torch.Tensor
    present: torch.Tensor
    tokens: torch.Tensor
    labels: torch.Tensor
    segments: torch.Tensor
    positions: torch.Tensor
    asked: list[list[Dialogue]]

    def mask(self, prefix: int) -> torch.Tensor:
        """Attention mask, bool `[B, 1, prefix + TEXT, prefix + TEXT]`: causal, without attention between questions.

        Args:
            prefix: columns before the questions, `<bos>` and the picture.
        """
        owner = torch.nn.functional.pad(self.segments, (prefix, 0), value=-1)
        length = owner.shape[1]
        shared = torch.arange(length, device=owner.device) < prefix
        allowed = shared | (owner[:, :, None] == owner[:, None, :])
        causal = torch.ones(length, length, dtype=torch.bool, device=owner.device).tril()
        return (allowed & causal)[:, None]

    def to(self, device: torch.device) -> Batch:
        moved = {key: value.to(device) for key, value in self.__dict__.items() if isinstance(value, torch.Tensor)}
        return Batch(**moved, asked=self.asked)


@lru_cache(maxsize=1)
def _tokenizer():
    return model.tokenizer()


@lru_cache(maxsize=100_000)
def encode(text: str) -> tuple[int, ...]:
    return tuple(_tokenizer()(text, add_special_tokens=False)["input_ids"])


def small(image: Image.Image) -> np.ndarray:
    """The picture as the processor resizes it, uint8 `[144, 144, 3]`."""
    return np.asarray(image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC))


def pixels(images: torch.Tensor) -> torch.Tensor:
    """uint8 `[B, H, W, 3]` to the processor's float32 `[B, 3, H, W]`."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def patch_words(objects: tuple[scenes.SceneObject, ...]) -> np.ndarray:
    """Word labels of each patch, int8 `[144, len(GROUPS)]`; all patches of an object have the same labels."""
    table = np.array([[len(words) for words in GROUPS.values()]] * VISUAL_TOKENS, dtype=np.int8)
    table[:, list(GROUPS).index("background")] = 0
    for item in objects:
        cells = list(item.patches)
        for column, (group, words) in enumerate(GROUPS.items()):
            if group == "center":
                table[cells[0], column] = 0
            elif group == "background":
                table[cells, column] = 1
            elif (word := getattr(item, group)) is not None:
                table[cells, column] = words.index(word) if word else IGNORE
    return table


def describe(array: np.ndarray) -> tuple[scenes.SceneObject, ...]:
    """The single object of an easy-VQA training picture, found by its color on the plain background.

    Args:
        array: uint8 `[144, 144, 3]`.
    """
    differs = np.abs(array.astype(int) - array[0, 0].astype(int)).sum(-1) > 60
    if differs[:3].any() and differs.mean() > 0.5:  # the corner pixel belongs to the object
        return ()
    rows, columns = np.flatnonzero(differs.any(1)), np.flatnonzero(differs.any(0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    filled = differs[top:bottom, left:right].mean()
    shape = "rectangle" if filled > 0.9 else "circle" if filled > 0.7 else "triangle"
    y, x = (top + bottom) // 2, (left + right) // 2
    middle = array[y, x].astype(int)
    official = {
        "red": (255, 0, 0),
        "blue": (0, 0, 255),
        "green": (0, 255, 0),
        "brown": (165, 42, 42),
        "yellow": (255, 255, 0),
    }
    palette = {**scenes.COLORS, **official}
    color = min(palette, key=lambda name: sum(abs(middle - palette[name])))
    grid, cell = scenes.GRID, IMAGE_SIZE // scenes.GRID
    cover = differs.reshape(grid, cell, grid, cell).mean((1, 3)).ravel()
    center = int(y // cell * grid + x // cell)
    cells = [center, *(int(c) for c in np.flatnonzero(cover >= 0.2) if c != center)]
    return (
        scenes.SceneObject(
            shape,
            color,
            "",
            None,
            int(x) * 2,
            int(y) * 2,
            int(right - left),
            int(bottom - top),
            (0, 0, 0),
            tuple(cells),
        ),
    )


class Pool:
    """Pictures of one worker, of which a few are replaced at every step.

    The newest scene at step `s` has number `size + s * fresh`, so a resumed run rebuilds the same pool.
    """

    def __init__(
        self, seed: int, worker: int, workers: int, size: int, fresh: int, step: int = 0, with_easy: bool = True
    ):
        self.seed, self.worker, self.workers = seed, worker, workers
        self.size, self.fresh = size, fresh
        self.images = np.zeros((size, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
        self.objects: list[tuple[scenes.SceneObject, ...]] = [()] * size
        self.newest = step * fresh
        self._draw(size)
        self.easy: list[tuple[np.ndarray, tuple[scenes.SceneObject, ...], list[Dialogue]]] = []
        if with_easy:
            self._load_easy()

    def _draw(self, count: int) -> None:
        for _ in range(count):
            seed = scenes.TRAIN_SEEDS * (1 + self.seed) + self.newest * self.workers + self.worker
            scene, slot = scenes.scene(seed), self.newest % self.size
            self.images[slot], self.objects[slot] = small(scene.image), scene.objects
            self.newest += 1

    def _load_easy(self) -> None:
        questions: dict[int, list[Dialogue]] = {}
        for sample in easy_vqa.samples("train"):
            questions.setdefault(sample.image_id, []).append((f"easy {sample.kind}", sample.question, sample.answer))
        for image_id, path in sorted(easy_vqa.image_paths("train").items()):
            if image_id % self.workers == self.worker and image_id in questions:
                with Image.open(path) as file:
                    array = small(file.convert("RGB"))
                self.easy.append((array, describe(array), questions[image_id]))

    def batch(self, step: int, count: int, easy: int, captions: float, sizes: Sizes = (SQUARE,)) -> Batch:
        """`count` pictures, `easy` of them from easy-VQA, deterministic in `step`; then draws a few new scenes.

        All have one of `sizes` (height, width), chosen at random.
        """
        rng = random.Random(f"{self.seed} {self.worker} {step}")
        rows = []
        for index in range(count):
            if index < easy and self.easy:
                image, objects, questions = rng.choice(self.easy)
                asked = rng.sample(questions, len(questions))
            else:
                slot = rng.randrange(self.size)
                image, objects = self.images[slot], self.objects[slot]
                asked = ask_many(objects, rng, captions)
            rows.append((image, objects, asked))
        rng.shuffle(rows)  # easy-VQA pictures are not always the first ones
        self._draw(self.fresh)
        return pack(rows, random.Random(f"size {self.seed} {self.worker} {step}").choice(sizes))


def ask_many(objects: tuple[scenes.SceneObject, ...], rng: random.Random, captions: float = 0.0) -> list[Dialogue]:
    """Shuffled questions of every kind, most of the two kinds learned last; sometimes with the caption first."""
    kinds = [*scenes.KINDS, "size", "position", *["count"] * 3, *["presence"] * 6]
    rng.shuffle(kinds)
    found = (scenes.ask(objects, kind, rng) for kind in kinds)
    asked = list(dict.fromkeys((q.kind, q.text, q.answer) for q in found if q is not None))
    if rng.random() < captions:
        asked.insert(0, ("caption", "describe the image", scenes.caption(objects)))
    return asked


def resized(image: np.ndarray, words: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """A picture `[144, 144, 3]` and its patch labels at another size, with the same patch size of 12 pixels."""
    if size == SQUARE:
        return image, words
    height, width = size
    cell, grid = IMAGE_SIZE // scenes.GRID, scenes.GRID
    # A new patch has the labels of the old patch at its center.
    rows, columns = (((np.arange(side // cell) + 0.5) * grid * cell // side).astype(int) for side in size)
    words = words.reshape(grid, grid, -1)[rows[:, None], columns].reshape(len(rows) * len(columns), -1)
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)), words


def pack(
    rows: list[tuple[np.ndarray, tuple[scenes.SceneObject, ...], list[Dialogue]]], size: tuple[int, int] = SQUARE
) -> Batch:
    """Converts pictures, objects and as many questions as fit to tensors.

    Args:
        rows: one picture each: uint8 `[144, 144, 3]`, objects, questions.
        size: height and width of the pictures of the batch, multiples of 12.
    """
    present = torch.zeros(len(rows), len(PRESENT))
    for row, (_, objects, _) in enumerate(rows):
        for item in objects:
            for word in (item.color, item.shape, item.digit):
                if word:
                    present[row, PRESENT.index(word)] = 1
    packed = pack_questions([asked for _, _, asked in rows], encode, model.VOCABULARY["<eos>"], TEXT)
    pictures, shown = zip(*(resized(row[0], patch_words(row[1]), size) for row in rows), strict=True)
    return Batch(
        images=torch.from_numpy(np.stack(pictures)),
        patches=torch.from_numpy(np.stack(shown)).long(),
        present=present,
        **packed._asdict(),
    )
