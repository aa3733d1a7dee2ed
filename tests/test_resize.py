# SPDX-License-Identifier: Apache-2.0
"""Resizing as a baseline for pruning: the largest token count within a budget, read from the processor's output."""

from __future__ import annotations

from typing import Any

import pytest
from PIL import Image

import vtprune
from vtprune import refvlm
from vtprune.study.resize import resized


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


def test_fixed_grid_cannot() -> None:
    _, processor = refvlm.load(name="llava")
    with pytest.raises(vtprune.MethodError, match="resizing cannot reach 70 visual tokens"):
        ids = processor.image_token_id
        resized(
            processor, Image.new("RGB", (96, 96)), _prompt(processor), lambda m: int((m["input_ids"] == ids).sum()), 70
        )
