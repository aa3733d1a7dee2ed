# SPDX-License-Identifier: Apache-2.0
"""Automatic ratios from pixels, for engines that need the count of a picture before the model runs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import BudgetError
from .options import Share, fits, shorten

_BLOCK = 16  # pixels, about a token of Qwen-VL and of 14-pixel towers
_STEP = 16  # of 256 gray levels: smaller differences between neighbors are noise
_SAME = 2  # gray levels: blocks that differ by no more are the same block
_LEVELS = 2 * (255 // _STEP + 1) + 1


def content(picture: Any) -> float:
    """How much a picture or a clip holds, from 0 (flat) to 1.

    The mean over blocks of 16 x 16 pixels of the entropy of differences between neighboring pixels, in steps of 16 gray
    levels, divided by its largest value. A block that repeats the one to its left or above it, or the one at its place
    in the frame before, counts 0. Print has many and large differences, photographs fewer, flat areas and smooth
    gradients none.

    Args:
        picture: Anything that becomes an array `[H, W]`, `[H, W, C]` or `[T, H, W, C]` of 0 to 255 (a PIL picture, a
            clip); floats up to 1 are multiplied by 255.
    """
    gray = _gray(picture)
    height, width = (max(n // _BLOCK, 1) * _BLOCK for n in gray.shape[1:])
    gray = np.pad(gray, ((0, 0), (0, max(height - gray.shape[1], 0)), (0, max(width - gray.shape[2], 0))), mode="edge")
    gray = gray[:, :height, :width]
    levels = (np.diff(gray, axis=2, append=gray[:, :, -1:]) + _STEP // 2) // _STEP + _LEVELS // 2
    tiles = (len(gray), height // _BLOCK, _BLOCK, width // _BLOCK, _BLOCK)
    number = np.arange(tiles[0] * tiles[1] * tiles[3]).reshape(tiles[0], tiles[1], 1, tiles[3], 1)
    size = number.size
    counts = np.bincount((number * _LEVELS + levels.reshape(tiles)).ravel(), minlength=size * _LEVELS)
    share = counts.reshape(tiles[0], tiles[1], tiles[3], _LEVELS) / _BLOCK**2
    entropy = -(share * np.log2(share, out=np.zeros_like(share), where=share > 0)).sum(-1) / math.log2(_LEVELS)
    return float((entropy * ~_repeated(gray.reshape(tiles))).mean())


def _gray(picture: Any) -> np.ndarray:
    """`[T, H, W]` int16 gray levels."""
    pixels = np.asarray(picture.convert("RGB") if hasattr(picture, "convert") else picture)
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim == 3:
        pixels = pixels[None]
    if pixels.ndim != 4 or 0 in pixels.shape:
        raise BudgetError(f"a picture of shape {pixels.shape}; expected [H, W], [H, W, C] or, for a clip, [T, H, W, C]")
    if pixels.shape[1] in (1, 3) and pixels.shape[3] not in (1, 3):
        pixels = pixels.transpose(0, 2, 3, 1)
    pixels = pixels.astype(np.float32) * (255 if pixels.dtype.kind == "f" and pixels.max() <= 1 else 1)
    weights = [0.299, 0.587, 0.114] if pixels.shape[3] >= 3 else [1.0]
    return np.rint(pixels[..., : len(weights)] @ np.array(weights, np.float32)).astype(np.int16)


def _repeated(blocks: np.ndarray) -> np.ndarray:
    """Which blocks `[T, Y, X]` of `[T, Y, 16, X, 16]` are the same as their neighbor to the left, above, or before."""
    out = np.zeros((blocks.shape[0], blocks.shape[1], blocks.shape[3]), dtype=bool)
    for axis, place in ((0, 0), (1, 1), (3, 2)):
        same = (np.abs(np.diff(blocks, axis=axis)) <= _SAME).all((2, 4))
        later: list[slice] = [slice(None)] * 3
        later[place] = slice(1, None)
        out[tuple(later)] |= same
    return out


@dataclass(frozen=True)
class PixelAuto:
    """Automatic ratio of each picture or clip from its pixels.

    The ratio is `mean * content / typical`, between `min` and `max`.

    Attributes:
        mean: Ratio of a picture with typical content, above 0 and at most 1.
        min, max: Bounds of the ratio.
        typical: Content of a typical picture, see `content`. `fit` finds the one with which your pictures have the mean
            ratio that you want.
    """

    mean: float = 0.25
    min: float = 0.05
    max: float = 1.0
    typical: float = 0.2

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not fits(value, Share) or value == 0:
                raise BudgetError(
                    f"{field.name} of an automatic ratio is {shorten(value)}; expected a share above 0, at most 1"
                )
        if not self.min <= self.mean <= self.max:
            raise BudgetError(
                f"an automatic ratio has min={self.min:g}, mean={self.mean:g} and max={self.max:g}; expected min <= "
                "mean <= max"
            )

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> PixelAuto:
        """From an object of JSON."""
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := [name for name in options if name not in known]:
            raise BudgetError(
                f"an automatic ratio has no {', '.join(map(shorten, unknown))}; expected {', '.join(known)}"
            )
        return cls(**options)

    def ratio(self, picture: Any) -> float:
        """Share of the picture's tokens that stays."""
        return self.for_content(content(picture))

    def for_content(self, amount: float) -> float:
        """The ratio of a picture with this content."""
        return min(max(self.mean * amount / self.typical, self.min), self.max)

    def fit(self, pictures: Sequence[Any]) -> PixelAuto:
        """With the `typical` at which pictures have the mean ratio `mean`, as nearly as `min` and `max` allow it."""
        amounts = [content(picture) for picture in pictures]
        if not amounts:
            raise BudgetError("there are no pictures to fit an automatic ratio to; expected one or more")
        low, high = 1e-6, 1.0  # the mean falls as `typical` grows
        for _ in range(60):
            middle = (low + high) / 2
            trial = dataclasses.replace(self, typical=middle)
            if sum(map(trial.for_content, amounts)) / len(amounts) > self.mean:
                low = middle
            else:
                high = middle
        return dataclasses.replace(self, typical=high)
