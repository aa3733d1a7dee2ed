# SPDX-License-Identifier: Apache-2.0
"""Drawing of visual tokens over pictures; pure functions."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .patch_boxes import PictureError

if TYPE_CHECKING:
    from PIL.Image import Image

# Weights of red, green and blue in luma (ITU-R BT.601).
LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)

# From low to high values; dark blue, green and yellow differ for color-blind readers too.
_HEAT = np.array([(38, 20, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], dtype=np.float32)
_COLORS = 0.65  # opacity of the heat
_VEIL = 0.7  # opacity of the white over parts of the picture that no token shows
_PANELS = 8  # per row
MAX_SIDE = 2048  # pixels of drawn pictures: drawing on 12 million pixels takes seconds and a gigabyte
# Sizes of a clip's strip in pixels: its width, the height of the bars and of the frames below them.
_STRIP, _BARS, _THUMBS = 1152, 72, 72
_EMPTY, _FILLED = (225, 225, 225), (33, 145, 140)


def paint_values(size: tuple[int, int], boxes: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Value of the token at every pixel.

    Args:
        size: Width and height of the picture.
        boxes: `[n, 4]` left, top, right, bottom of each token in shares of the picture; clipped to it.
        values: `[n]` values of the tokens.

    Returns:
        np.ndarray: `[height, width]` float32; a pixel belongs to the box that contains its center, NaN without one.
    """
    width, height = size
    out = np.full((height, width), np.nan, dtype=np.float32)
    scale = np.array([width, height, width, height])
    # The first pixel whose center is not before the edge; rounding keeps neighbors from overlapping or leaving a gap.
    edges = np.ceil(np.round(boxes * scale - 0.5, 6)).clip(0, scale).astype(int)
    for (left, top, right, bottom), value in zip(edges, values, strict=True):
        out[top:bottom, left:right] = value
    return out


def shrunk(image: Image) -> Image:
    """The picture itself, or a smaller copy if a side is longer than `MAX_SIDE`."""
    if max(image.size) <= MAX_SIDE:
        return image
    small = image.copy()
    small.thumbnail((MAX_SIDE, MAX_SIDE))
    return small


def dim(image: Image, boxes: np.ndarray, loss: np.ndarray, strength: float = 0.65) -> Image:
    """The picture with dropped tokens dark and gray, and parts that the model did not see under a white veil.

    Args:
        image: RGB.
        boxes: `[n, 4]`, see `paint_values`.
        loss: `[n]` in [0, 1]: 0 for tokens that stayed.
        strength: Share of color and brightness that a loss of 1 removes.
    """
    pixels = np.asarray(image, dtype=np.float32)  # [height, width, 3]
    share = paint_values(image.size, boxes, loss)[..., None] * np.float32(strength)
    gray = (pixels @ LUMA)[..., None]
    dimmed = (pixels * (1 - share) + gray * share) * (1 - share)
    return _picture(np.where(np.isnan(share), pixels * (1 - _VEIL) + 255 * _VEIL, dimmed))


def heat(image: Image, boxes: np.ndarray, values: np.ndarray) -> Image:
    """The gray picture under colors, from dark blue (0) to yellow (1); tokens without a value (NaN) stay gray.

    Args:
        image: RGB.
        boxes: `[n, 4]`, see `paint_values`.
        values: `[n]` in [0, 1] or NaN.
    """
    pixels = np.asarray(image, dtype=np.float32)
    gray = (pixels @ LUMA)[..., None].repeat(3, -1)
    value = paint_values(image.size, boxes, values)
    position = np.nan_to_num(value).clip(0, 1) * (len(_HEAT) - 1)
    low = position.astype(int).clip(0, len(_HEAT) - 2)
    part = (position - low)[..., None]
    color = _HEAT[low] * (1 - part) + _HEAT[low + 1] * part
    return _picture(np.where(np.isnan(value)[..., None], gray, gray * (1 - _COLORS) + color * _COLORS))


def sheet(rows: Sequence[Sequence[tuple[Image, str]]], height: int = 288) -> Image:
    """Rows of captioned pictures on white; long rows are wrapped."""
    broken = [row[i : i + _PANELS] for row in rows for i in range(0, len(row), _PANELS)]
    tall = height if max(map(len, broken)) <= 4 else height // 2
    lines = [side_by_side([p for p, _ in row], [c for _, c in row], height=tall) for row in broken]
    return lines[0] if len(lines) == 1 else stack(lines)


def strip(frames: Sequence[Image], kept: Sequence[int], total: Sequence[int]) -> Image:
    """Strip of a clip: a bar for every frame, as high as the share of its tokens that stayed, above some frames.

    Args:
        frames: The frames, in order.
        kept, total: Number of tokens of each frame that stayed, and of all its tokens.

    Returns:
        Image: RGB, `_STRIP` pixels wide. The frames below the bars are evenly spaced, as many as fit, each near its own
        bar.
    """
    from PIL import Image as images
    from PIL import ImageDraw

    count = len(frames)
    sheet = images.new("RGB", (_STRIP, _BARS + _THUMBS), "white")
    draw = ImageDraw.Draw(sheet)
    edges = np.linspace(0, _STRIP, count + 1).round().astype(int)
    gap = 1 if count <= _STRIP // 4 else 0
    for left, right, k, n in zip(edges, edges[1:], kept, total, strict=False):
        top = round(_BARS * (1 - k / n)) if n else _BARS
        last = max(left, right - 1 - gap)  # a bar is a pixel wide at least
        draw.rectangle((left, 0, last, _BARS - 1), fill=_EMPTY)
        if top < _BARS:
            draw.rectangle((left, top, last, _BARS - 1), fill=_FILLED)
    wide = max(1, round(frames[0].width * _THUMBS / frames[0].height))
    shown = max(1, min(count, _STRIP // (wide + 2)))
    for number in range(shown):
        middle = (number + 0.5) * _STRIP / shown
        picture = frames[min(int(middle * count / _STRIP), count - 1)].convert("RGB").resize((wide, _THUMBS))
        sheet.paste(picture, (round(middle - wide / 2), _BARS))
    return sheet


def stack(pictures: Sequence[Image]) -> Image:
    """Pictures below each other on white, left-aligned."""
    from PIL import Image as images

    out = images.new("RGB", (max(p.width for p in pictures), sum(p.height for p in pictures)), "white")
    top = 0
    for picture in pictures:
        out.paste(picture, (0, top))
        top += picture.height
    return out


def png(image: Image) -> bytes:
    """The picture as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _picture(pixels: np.ndarray) -> Image:
    from PIL import Image as images

    return images.fromarray(np.rint(pixels).clip(0, 255).astype(np.uint8))


def side_by_side(pictures: Sequence[Image], captions: Sequence[str] = (), *, height: int = 384, gap: int = 12) -> Image:
    """Pictures in a row on white, scaled to one height, with captions above.

    Args:
        pictures: At least one.
        captions: A line for each picture, or none at all; lines wider than their picture are wrapped.
        height: Height of the pictures in pixels; those that would be wider than `MAX_SIDE` are lower.
        gap: White space around them, in pixels.

    Returns:
        Image: RGB.

    Raises:
        PictureError: There is no picture, or pictures and captions differ in number.
    """
    from PIL import Image as images
    from PIL import ImageDraw, ImageFont

    if not pictures or (captions and len(captions) != len(pictures)):
        raise PictureError(f"got {len(pictures)} pictures and {len(captions)} captions; expected as many of each")
    scaled = [_of_height(picture, height) for picture in pictures]
    font = ImageFont.load_default(size=15)
    texts = [_wrapped(text, picture.width, font) for text, picture in zip(captions, scaled, strict=False)]
    lines = max((text.count("\n") + 1 for text in texts), default=0)
    top = gap + 20 * lines
    sheet = images.new("RGB", (sum(p.width for p in scaled) + gap * (len(scaled) + 1), top + height + gap), "white")
    draw, left = ImageDraw.Draw(sheet), gap
    for index, picture in enumerate(scaled):
        sheet.paste(picture, (left, top))
        if texts:
            draw.multiline_text((left, gap // 2), texts[index], fill="black", font=font)
        left += picture.width + gap
    return sheet


def _of_height(image: Image, height: int) -> Image:
    """The picture scaled to a height, RGB; lower if it would be wider than `MAX_SIDE`."""
    scale = min(height / image.height, MAX_SIDE / image.width)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.convert("RGB").resize(size)


def _wrapped(text: str, width: int, font: Any) -> str:
    """The text in lines of at most `width` pixels, wrapped between words."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)
