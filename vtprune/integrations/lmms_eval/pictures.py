# SPDX-License-Identifier: Apache-2.0
"""Padding of pictures to squares, as in the published results of LLaVA 1.5."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image


def square(picture: Image.Image, mean: Sequence[float]) -> Image.Image:
    """Pads a picture to a centered square of its longer side, filled with the processor's mean color.

    LLaVA 1.5 was trained and evaluated this way (`image_aspect_ratio: pad`); the stock processors of transformers
    crop the longer side away instead.

    Args:
        picture: A picture of any size and mode.
        mean: `image_mean` of the processor, three shares of full color.
    """
    picture = picture.convert("RGB")
    width, height = picture.size
    if width == height:
        return picture
    side = max(width, height)
    red, green, blue = (int(share * 255) for share in mean)
    canvas = Image.new("RGB", (side, side), (red, green, blue))
    canvas.paste(picture, ((side - width) // 2, (side - height) // 2))
    return canvas
