# SPDX-License-Identifier: Apache-2.0
"""Automatic ratios from pixels: the measure of content, bounds, and fitting the mean."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from vtprune.core.pixel_auto import PixelAuto, content
from vtprune.errors import BudgetError
from vtprune.integrations.vllm.settings import ServingError, parse


def page(lines: int) -> Image.Image:
    """A white page with print on it."""
    out = Image.new("RGB", (320, 320), "white")
    for line in range(lines):
        ImageDraw.Draw(out).text((4, 14 * line), "the quick brown fox jumps over the lazy dog 0123456789", fill="black")
    return out


def photograph() -> Image.Image:
    """Smooth areas of many colors."""
    colors = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    return Image.fromarray(colors).resize((320, 320), Image.Resampling.BICUBIC)


def test_documents_hold_more_than_photographs_and_those_more_than_flat_pictures() -> None:
    gradient = np.broadcast_to(np.linspace(0, 255, 320)[None, :, None], (320, 320, 3)).astype(np.uint8)
    amounts = [content(p) for p in (Image.new("RGB", (320, 320), "red"), gradient, photograph(), page(7), page(22))]
    assert amounts[:2] == [0, 0] and amounts == sorted(amounts) and len(set(amounts)) == 4


def test_what_repeats_counts_once() -> None:
    tile = np.random.default_rng(1).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    once = content(tile)
    assert content(np.tile(tile, (4, 4, 1))) == pytest.approx(once / 16, rel=0.1)
    still = np.random.default_rng(2).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert content(np.stack([still] * 4)) == pytest.approx(content(still) / 4)
    noisy = np.clip(np.stack([still] * 4).astype(int) + np.arange(4)[:, None, None, None] % 2, 0, 255).astype(np.uint8)
    assert content(noisy) == pytest.approx(content(still) / 4, rel=0.01)  # one gray level does not count


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from([None, 1, 3, 4]), st.integers(0, 9))
def test_pictures_of_any_shape_have_a_content(height: int, width: int, channels: int | None, seed: int) -> None:
    shape = (height, width) if channels is None else (height, width, channels)
    picture = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    assert 0 <= content(picture) <= 1
    assert content(picture) == content((picture / 255).astype(np.float32)) or picture.max() < 255
    assert PixelAuto(min=0.1, max=0.7).ratio(picture) == pytest.approx(
        min(max(0.25 * content(picture) / 0.2, 0.1), 0.7)
    )


def test_the_mean_over_pictures_is_the_one_that_was_asked_for() -> None:
    pictures = [page(n) for n in (2, 8, 16, 22)] + [photograph(), Image.new("RGB", (64, 64), "blue")]
    for mean in (0.1, 0.25, 0.5):
        fitted = PixelAuto(mean=mean, min=0.01).fit(pictures)
        ratios = [fitted.ratio(p) for p in pictures]
        assert sum(ratios) / len(ratios) == pytest.approx(mean, abs=1e-3)
        assert ratios[3] > ratios[1] > ratios[5] == 0.01


@pytest.mark.parametrize(
    ("ratio", "words"),
    [
        ({"mean": 0}, "mean of an automatic ratio is 0"),
        ({"mean": 0.5, "max": 0.4}, "min <= mean <= max"),
        ({"energy": 0.9}, "no 'energy'; expected mean, min, max, typical"),
        ({"typical": "a"}, "typical of an automatic ratio is 'a'"),
        ({"mean": 10**400}, "mean of an automatic ratio is 1000"),
        ({"max": "x" * 10_000}, r"max of an automatic ratio is 'x+\.\.\."),
    ],
)
def test_bad_automatic_ratios_are_one_line(ratio: dict, words: str) -> None:
    with pytest.raises(ServingError, match=words) as caught:
        parse({"ratio": ratio})
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700
    with pytest.raises(BudgetError):
        PixelAuto.of(ratio)


def test_a_served_picture_gets_its_own_count() -> None:
    config = parse({"ratio": "auto"})
    full, flat = config.share_of(page(22)), config.share_of(Image.new("RGB", (320, 320)))
    assert full is not None and config.counts([100], full)[0] > 30 and config.counts([100], flat) == [5]
    assert config.share_of((np.zeros((2, 32, 32, 3), np.uint8), {"fps": 2})) == 0.05  # a clip with its metadata
    assert config.share_of(np.zeros((9, 64))) == 0.25  # features have no pixels
    marks = {parse(json.loads(text)).fingerprint for text in ('{"ratio": "auto"}', '{"ratio": {"mean": 0.3}}')}
    assert len(marks | {parse({"ratio": 0.25}).fingerprint}) == 3
