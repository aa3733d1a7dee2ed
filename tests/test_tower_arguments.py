# SPDX-License-Identifier: Apache-2.0
"""Arguments of the blocks of a vision tower after rows were dropped."""

from __future__ import annotations

from typing import Any

import torch

from vtprune.towers.arguments import Rows, cut_offsets


def rows_of(length: int, kept: list[int]) -> Rows:
    unused: Any = None  # read by other functions only
    return Rows(1, length, torch.tensor([0]), torch.tensor([kept]), unused)


def test_windows_count_the_rows_that_are_left() -> None:
    offsets = torch.tensor([0, 4, 8, 10])
    assert cut_offsets(offsets, rows_of(10, [0, 3, 5, 9])).tolist() == [0, 2, 3, 4]


def test_windows_without_rows_drop_out() -> None:
    """Windows without kept rows are removed: packed attention accepts no empty window."""
    offsets = torch.tensor([0, 4, 8, 10])
    assert cut_offsets(offsets, rows_of(10, [1, 2, 8])).tolist() == [0, 2, 3]
    assert cut_offsets(offsets, rows_of(10, [4])).tolist() == [0, 1]
