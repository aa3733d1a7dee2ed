# SPDX-License-Identifier: Apache-2.0
"""Pictures of dropped patches, pixel by pixel."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vtprune.pictures import Pictures
from vtprune.pictures_places import View
from vtprune.visualize import PictureError, before_and_after, dim_dropped, keep_grid, side_by_side

RED = (200, 40, 0)


def _cell(pixel: int, pixels: int, cells: int) -> int:
    """The cell that holds the centre of a pixel."""
    return next(cell for cell in range(cells) if (pixel + 0.5) / pixels < (cell + 1) / cells)


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(1, 23),
    width=st.integers(1, 23),
    rows=st.integers(1, 6),
    cols=st.integers(1, 6),
    seed=st.integers(0, 99),
)
def test_any_picture_size_dims_exactly_the_dropped_cells(height, width, rows, cols, seed):
    keep = np.random.default_rng(seed).random((rows, cols)) < 0.5
    out = dim_dropped(Image.new("RGB", (width, height), RED), keep)
    assert out.size == (width, height)
    for y in range(height):
        for x in range(width):
            stayed = keep[_cell(y, height, rows), _cell(x, width, cols)]
            assert (out.getpixel((x, y)) == RED) == stayed


def test_dropped_patches_are_darker_and_greyer():
    out = dim_dropped(Image.new("RGB", (8, 4), RED), [[True, False]], strength=0.5)
    assert out.getpixel((0, 0)) == RED
    grey = 0.299 * 200 + 0.587 * 40
    assert out.getpixel((7, 3)) == tuple(round((value / 2 + grey / 2) / 2) for value in RED)


def test_what_went_first_is_darkest():
    stages = [[[True, True, False]], [[True, False, False]]]
    left, middle, right = (sum(dim_dropped(Image.new("RGB", (3, 1), RED), stages).getpixel((x, 0))) for x in range(3))
    assert left == sum(RED) and left > middle > right


def test_strength_zero_and_nothing_dropped_leave_the_picture_alone():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8))
    assert dim_dropped(picture, np.zeros((2, 2)), strength=0).tobytes() == picture.tobytes()
    assert dim_dropped(picture, np.ones((2, 2))).tobytes() == picture.tobytes()


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_any_mode_becomes_rgb(mode):
    assert dim_dropped(Image.new(mode, (5, 5)), np.ones((2, 2), dtype=bool)).mode == "RGB"


@pytest.mark.parametrize("keep", [np.ones(4), np.ones((0, 3)), [np.ones((2, 2)), np.ones((2, 3))]])
def test_masks_that_are_no_grid_are_refused(keep):
    with pytest.raises(PictureError, match="keep mask has shape"):
        dim_dropped(Image.new("RGB", (4, 4)), keep)


def test_keep_grid_places_tokens_and_leaves_out_newlines():
    row, col, kept = [0, 0, 1, -1], [0, 2, 1, -1], [True, False, False, False]
    grid = keep_grid(row, col, kept)
    assert grid.tolist() == [[True, True, False], [True, False, True]]
    assert keep_grid(row, col, kept, shape=(3, 3)).shape == (3, 3)


@pytest.mark.parametrize(
    ("row", "col", "kept", "shape", "message"),
    [
        ([0], [0, 1], [True], None, "1, 2 and 1"),
        ([-1], [-1], [True], None, "no visual token"),
        ([2], [0], [True], (2, 2), "outside"),
    ],
)
def test_keep_grid_refuses_what_has_no_place(row, col, kept, shape, message):
    with pytest.raises(PictureError, match=message):
        keep_grid(row, col, kept, shape)


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
    row = torch.tensor([0, 0, 1, 1, 0, 0, 0, -1, 1, 1, 1, -1])
    col = torch.tensor([0, 1, 0, 1, 0, 1, 2, -1, 0, 1, 2, -1])

    def __len__(self) -> int:
        return len(self.crop)


def test_a_picture_seen_twice_gets_a_panel_for_each_view():
    cuts = [torch.tensor([0, 1, 3, 4, 9, 11]), torch.tensor([0, 4])]  # numbers in `_Places` after each of two cuts
    picture = Image.new("RGB", (60, 60), RED)
    places = _Places()
    views = []
    for crop, (rows, cols) in enumerate([(2, 2), (2, 3)]):
        tokens = ((places.crop == crop) & (places.row >= 0)).nonzero()[:, 0].numpy()
        row, col = places.row.numpy()[tokens], places.col.numpy()[tokens]
        boxes = np.stack([col / cols, row / rows, (col + 1) / cols, (row + 1) / rows], 1)
        views.append(View(picture, tokens, boxes, ("whole", "tiles")[crop]))
    pruning = SimpleNamespace(places=places, kept_flat=cuts)
    pruning.show = lambda image: Pictures(pruning, views)
    sheet = before_and_after(picture, pruning, ("yes", "no"))
    side, gap = 384, 12
    assert sheet.width == 3 * side + 4 * gap
    top = sheet.height - gap - side

    def light(panel: int, row: int, col: int, rows: int, cols: int) -> int:
        x = gap + panel * (side + gap) + (2 * col + 1) * side // (2 * cols)
        return sum(sheet.getpixel((x, top + (2 * row + 1) * side // (2 * rows))))

    whole = [light(1, row, col, 2, 2) for row in range(2) for col in range(2)]
    assert light(0, 0, 0, 1, 1) == whole[0] == sum(RED)
    assert whole[2] < whole[1] == whole[3] < whole[0]  # the first cut took the third, the second cut two more
    tiles = [light(2, row, col, 2, 3) for row in range(2) for col in range(3)]
    assert tiles[1] == tiles[2] == tiles[3] == tiles[5] < tiles[4] < tiles[0] == sum(RED)
