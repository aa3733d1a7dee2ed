# SPDX-License-Identifier: Apache-2.0
"""The part of a picture that the tiles of an any-resolution model show.

The picture is padded to a canvas of tiles; the model drops tokens of the padding, with a rounding of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from .image_source import Source
from .preprocessing import Box


def tiles_box(source: Source, size: Sequence[int], side: int) -> Box:
    """Rectangle of a picture that the tokens of its tiles show, after padding was dropped.

    Args:
        source: Source of a call of an any-resolution model.
        size: Height and width of the picture.
        side: Tokens along a tile.
    """
    from transformers.image_processing_utils import select_best_resolution

    (height, width), (tall, wide) = size, select_best_resolution(tuple(size), source.pinpoints)
    # The picture keeps its aspect ratio; one side fills the canvas, the other is padded evenly.
    scale = min(tall / height, wide / width)
    down, across = min(math.ceil(height * scale), tall), min(math.ceil(width * scale), wide)
    if tall / height < wide / width:
        down = tall
    else:
        across = wide
    top, left = (tall - down) // 2, (wide - across) // 2
    rows, cols = tall // source.side * side, wide // source.side * side
    pad_rows = pad_cols = 0
    if width / height > cols / rows:
        pad_rows = (rows - int(round(height * cols / width, 7))) // 2
    else:
        pad_cols = (cols - int(round(width * rows / height, 7))) // 2
    step = source.side / side  # pixels of the canvas along a token
    return (
        (pad_cols * step - left) / across,
        (pad_rows * step - top) / down,
        ((cols - pad_cols) * step - left) / across,
        ((rows - pad_rows) * step - top) / down,
    )
