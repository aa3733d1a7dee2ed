# SPDX-License-Identifier: Apache-2.0
"""Resizing as a baseline for pruning: the largest token count within a budget, read from the processor's output."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from transformers import LlavaNextProcessor
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

import vtprune
from vtprune import refvlm
from vtprune.study.resize import ASPECT, Frames, _sizes, resized


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


@pytest.mark.parametrize("size", [(50, 40), (96, 24), (5, 5)], ids=str)
def test_a_picture_that_the_processor_enlarges_is_enlarged_less(size: tuple[int, int]) -> None:
    _, processor = refvlm.load(name="qwen2_5_vl")
    cell = processor.image_processor.patch_size * processor.image_processor.merge_size
    processor.image_processor.size = {"shortest_edge": 150 * cell**2, "longest_edge": 400 * cell**2}
    image, before = Image.effect_noise(size, 80).convert("RGB"), dict(processor.image_processor.size)

    def count(inputs: Any) -> int:
        return int(inputs["mm_token_type_ids"].sum())

    whole = count(_prompt(processor)(image))
    assert whole >= 150
    for share in (1.0, 0.9, 0.5, 0.25):
        budget = int(share * whole)
        assert 0.7 * budget <= resized(processor, image, _prompt(processor), count, budget)[1] <= budget
    assert dict(processor.image_processor.size) == before


def test_the_lower_bound_of_the_video_processor_is_lifted_for_clips() -> None:
    _, stock = refvlm.load(name="qwen2_5_vl")
    _, clips = refvlm.load(name="qwen2_5_vl")
    cell = clips.image_processor.patch_size * clips.image_processor.merge_size
    clips.image_processor.size = {"shortest_edge": 50 * cell**2, "longest_edge": 400 * cell**2}
    processor = SimpleNamespace(image_processor=stock.image_processor, video_processor=clips.image_processor)
    frames = Frames(Image.effect_noise((8 * cell, 8 * cell), 80).convert("RGB") for _ in range(2))
    for budget in (30, 9):
        _, tokens = resized(
            processor, frames, lambda f: _prompt(clips)(f[0]), lambda m: int(m["mm_token_type_ids"].sum()), budget
        )
        assert 0.7 * budget <= tokens <= budget
    assert clips.image_processor.size["shortest_edge"] == 50 * cell**2


def test_a_picture_cut_into_tiles_gets_fewer_tiles_and_keeps_its_pixels() -> None:
    """A picture of a few pixels would have another shape, and so fewer tiles. The processor may ask for the cutting."""
    images = GotOcr2ImageProcessorPil(size={"height": 16, "width": 16}, crop_to_patches=False)
    image = Image.effect_noise((640, 480), 80).convert("RGB")
    for budget, tiles in ((13, 13), (12, 7), (7, 7), (6, 5), (4, 1)):
        seen: list[tuple[int, int]] = []

        def prompt(picture: Image.Image, seen: list[tuple[int, int]] = seen) -> Any:
            seen.append(picture.size)
            return images(images=[picture], crop_to_patches=True, return_tensors="pt")

        made, tokens = resized(
            SimpleNamespace(image_processor=images), image, prompt, lambda m: len(m["pixel_values"]), budget
        )
        assert tokens == len(made["pixel_values"]) == tiles
        assert set(seen) == {image.size} and images.max_patches == 12


def test_of_sizes_with_as_many_tokens_the_largest_is_shown() -> None:
    """Processors with a few fixed resolutions make the same tokens of many sizes."""
    processor = SimpleNamespace(image_processor=SimpleNamespace(resample=3))
    image = Image.new("RGB", (640, 480))
    for budget in (1368, 2000):
        made, tokens = resized(processor, image, lambda p: p, lambda p: 2340 if p.width > 448 else 1368, budget)
        assert (made.size, tokens) == ((448, 336), 1368)
    made, _ = resized(processor, image, lambda p: p, lambda p: 5 if p.width * 3 == p.height * 4 else 1, 5)
    assert made.size == image.size
    with pytest.raises(vtprune.MethodError, match="resizing cannot reach 4 visual tokens"):  # not of another shape
        resized(processor, image, lambda p: p, lambda p: 5 if 1.2 < p.width / p.height < 1.5 else 1, 4)


def test_tiles_whose_padding_is_left_out_do_not_mislead_the_search() -> None:
    """LLaVA-NeXT leaves out tokens of padding by a size's rounded shape: larger pictures may have fewer tokens."""
    grid = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    side = {"height": 336, "width": 336}
    images = LlavaNextImageProcessorPil(image_grid_pinpoints=grid, crop_size=side, size={"shortest_edge": 336})
    processor = LlavaNextProcessor.__new__(LlavaNextProcessor)
    vars(processor).update(image_processor=images, patch_size=14, num_additional_image_tokens=1)
    processor.vision_feature_select_strategy = "default"

    def count(picture: Any) -> int:
        return processor._get_num_multimodal_tokens(image_sizes=[picture.size[::-1]]).num_image_tokens[0]

    for size in ((817, 469), (1401, 394), (640, 480)):
        possible = {count(SimpleNamespace(size=it)) for it in [*_sizes(size, None, 0), size]}
        assert len(possible) > 2
        for tokens in possible:
            picture, found = resized(processor, Image.new("RGB", size), lambda p: p, count, tokens)
            assert found == count(picture) == tokens
        with pytest.raises(vtprune.MethodError, match=f"at least {min(possible)} of"):
            resized(processor, Image.new("RGB", size), lambda p: p, count, min(possible) - 1)
