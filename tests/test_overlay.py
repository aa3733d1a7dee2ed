# SPDX-License-Identifier: Apache-2.0
"""Rendered pictures of dropped patches, checked pixel by pixel."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from vtprune.report.draw import side_by_side
from vtprune.report.overlay import Pictures, before_and_after
from vtprune.report.patch_boxes import PictureError, View

RED = (200, 40, 0)


def test_side_by_side_keeps_proportions_and_breaks_long_captions():
    pictures = [Image.new("RGB", (40, 20), "red"), Image.new("L", (10, 20))]
    bare = side_by_side(pictures, height=100, gap=10)
    assert bare.size == (200 + 50 + 30, 120)
    assert bare.getpixel((10, 10)) == (255, 0, 0) and bare.getpixel((209, 109)) == (255, 0, 0)
    assert bare.getpixel((9, 10)) == (255, 255, 255)
    captioned = side_by_side(pictures, ["a", "a caption that is too long for its picture"], height=100, gap=10)
    assert captioned.width == bare.width and captioned.height > bare.height + 40


@pytest.mark.parametrize(("pictures", "captions"), [([], []), ([Image.new("RGB", (2, 2))], ["a", "b"])])
def test_side_by_side_refuses_a_mismatch(pictures, captions):
    with pytest.raises(PictureError, match="captions"):
        side_by_side(pictures, captions)


class _Places:
    """A picture seen whole (2 x 2) and in tiles (2 x 3, a newline after each row)."""

    crop = torch.tensor([0] * 4 + [1] * 8)
    grid_row = torch.tensor([0, 0, 1, 1, 0, 0, 0, -1, 1, 1, 1, -1])
    grid_col = torch.tensor([0, 1, 0, 1, 0, 1, 2, -1, 0, 1, 2, -1])

    def __len__(self) -> int:
        return len(self.crop)


def test_a_picture_seen_twice_gets_a_panel_for_each_view():
    cuts = [torch.tensor([0, 1, 3, 4, 9, 11]), torch.tensor([0, 4])]  # indices kept after each of two cuts
    picture = Image.new("RGB", (60, 60), RED)
    places = _Places()
    views = []
    for crop, (rows, cols) in enumerate([(2, 2), (2, 3)]):
        tokens = ((places.crop == crop) & (places.grid_row >= 0)).nonzero()[:, 0].numpy()
        row, col = places.grid_row.numpy()[tokens], places.grid_col.numpy()[tokens]
        boxes = np.stack([col / cols, row / rows, (col + 1) / cols, (row + 1) / rows], 1)
        views.append(View(picture, tokens, boxes, ("whole", "tiles")[crop]))
    pruning = SimpleNamespace(places=places, kept_flat=cuts)
    sheet = before_and_after(picture, Pictures(pruning, views), ("yes", "no"))
    side, gap = 384, 12
    assert sheet.width == 3 * side + 4 * gap
    top = sheet.height - gap - side

    def light(panel: int, row: int, col: int, rows: int, cols: int) -> int:
        x = gap + panel * (side + gap) + (2 * col + 1) * side // (2 * cols)
        return sum(sheet.getpixel((x, top + (2 * row + 1) * side // (2 * rows))))

    whole = [light(1, row, col, 2, 2) for row in range(2) for col in range(2)]
    assert light(0, 0, 0, 1, 1) == whole[0] == sum(RED)
    assert whole[2] < whole[1] == whole[3] < whole[0]  # the first cut dropped the third token, the second two more
    tiles = [light(2, row, col, 2, 3) for row in range(2) for col in range(3)]
    assert tiles[1] == tiles[2] == tiles[3] == tiles[5] < tiles[4] < tiles[0] == sum(RED)
