# SPDX-License-Identifier: Apache-2.0
"""Images whose rows are separated by a text token in the prompt (Pixtral, Mistral 3, LightOnOCR).

The separators are text and stay. Runs of placeholders between them are the rows of one image, and not images of their
own, if together they have as many positions as the encoder's output for one image has features.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def join_rows(
    runs: list[int], gaps: list[int], lengths: list[int] | None, alone: Callable[[int], Tensor]
) -> list[Tensor] | None:
    """Joins runs of placeholders that are the rows of one image.

    Args:
        runs: Lengths of the unbroken runs of placeholders.
        gaps: Positions between each run and the one before it; 0 for the first of a sample.
        lengths: Number of features of each image, if the encoder tells.
        alone: Returns the places `[n, 4]` of a run of `n` that is an image of its own.

    Returns:
        list: For each image `[n, 4]` frame, crop, row, column; None if no image comes in rows.
    """
    if lengths is None or sum(lengths) != sum(runs) or len(lengths) >= len(runs):
        return None
    places, run = [], 0
    for length in lengths:
        start, left = run, length
        while left > 0:
            left, run = left - runs[run], run + 1
        width, count = runs[start] if run > start else 0, run - start
        equal = left == 0 and all(n == width for n in runs[start:run])
        if not equal or any(gap != 1 for gap in gaps[start + 1 : run]):
            return None
        places.append(alone(width) if count == 1 else _rows(count, width))
    return places


def _rows(rows: int, cols: int) -> Tensor:
    """Places `[rows * cols, 4]` in row-major order."""
    row, col = torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij")
    return torch.stack([torch.zeros_like(row), torch.zeros_like(row), row, col], -1).reshape(-1, 4)
