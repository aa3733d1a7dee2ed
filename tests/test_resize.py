# SPDX-License-Identifier: Apache-2.0
"""Resizing as a baseline for pruning: the largest token count within a budget, read from the processor's output."""

from __future__ import annotations

from typing import Any

import pytest
from PIL import Image

import vtprune
from vtprune import refvlm
from vtprune.study.resize import ASPECT, resized


def _prompt(processor: Any) -> Any:
    return lambda picture: processor(images=[picture], text=[refvlm.prompt("what?")], return_tensors="pt")


def test_largest_count_not_above_the_budget() -> None:
    _, processor = refvlm.load(name="qwen2_5_vl")
    image, before = Image.new("RGB", (144, 96)), dict(processor.image_processor.size)
    possible = {rows * cols for rows in range(1, 13) for cols in range(1, 13) if abs(cols / rows - 1.5) < 0.5}
    for budget in (96, 95, 50, 20, 6):
        inputs, tokens = resized(
            processor, image, _prompt(processor), lambda m: int(m["mm_token_type_ids"].sum()), budget
        )
        assert tokens == int(inputs["image_grid_thw"].prod()) // 4 <= budget
        assert tokens in possible and tokens >= 0.55 * budget
    assert dict(processor.image_processor.size) == before, "the processor is as before"


@pytest.mark.parametrize("size", [(144, 96), (300, 200), (97, 211), (600, 10), (9, 400), (5, 5)], ids=str)
def test_the_picture_is_resized_once_to_the_largest_size_of_its_shape(size: tuple[int, int]) -> None:
    """The processor gets a size that it keeps, so that the picture is not resampled a second time."""
    _, processor = refvlm.load(name="qwen2_5_vl")
    cell = processor.image_processor.patch_size * processor.image_processor.merge_size
    shown: list[Any] = []

    def prompt(picture: Any) -> Any:
        shown.append(picture)
        return _prompt(processor)(picture)

    def count(inputs: Any) -> int:
        shown[-1] = int(inputs["mm_token_type_ids"].sum()), shown[-1]
        return int(shown[-1][0])

    image = Image.effect_noise(size, 80).convert("RGB")
    high, wide = size[1] / cell, size[0] / cell
    for budget in (1, 3, 7, 20, 45):
        shown.clear()
        inputs, tokens = resized(processor, image, prompt, count, budget)
        of_shape = [
            rows * columns
            for rows in range(1, max(1, int(high)) + 1)
            for columns in range(1, max(1, int(wide)) + 1)
            if max(columns * high / (rows * wide), rows * wide / (columns * high)) <= ASPECT
            and rows * columns <= budget
        ]
        assert max(of_shape, default=1) <= tokens <= budget
        picture = next(picture for count, picture in shown if count == tokens)
        if picture.size != size:
            grid = [int(number) // 2 for number in inputs["image_grid_thw"][0, 1:]]
            assert picture.size == (grid[1] * cell, grid[0] * cell)
            assert picture.tobytes() == image.resize(picture.size, Image.Resampling.BICUBIC).tobytes()


def test_fixed_grid_cannot() -> None:
    _, processor = refvlm.load(name="llava")
    with pytest.raises(vtprune.MethodError, match="resizing cannot reach 70 visual tokens"):
        ids = processor.image_token_id
        resized(
            processor, Image.new("RGB", (96, 96)), _prompt(processor), lambda m: int((m["input_ids"] == ids).sum()), 70
        )
