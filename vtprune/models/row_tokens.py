# SPDX-License-Identifier: Apache-2.0
"""Pictures whose rows stand apart in the prompt, with a word of text after each (Pixtral, Mistral 3, LightOnOCR).

The words are text and stay. That the runs of placeholders between them are the rows of one picture, and not pictures of
their own, is told by the encoder: together they take as many columns as one of its pictures has features.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def pictures(
    runs: list[int], gaps: list[int], lengths: list[int] | None, alone: Callable[[int], Tensor]
) -> list[Tensor] | None:
    """Puts the rows of pictures together.

    Args:
        runs: Lengths of the unbroken runs of placeholders.
        gaps: Columns between each run and the one before it; 0 for the first of a sample.
        lengths: Features of each picture, where the encoder tells.
        alone: Places `[n, 4]` of a run of `n` that is a picture of its own.

    Returns:
        list: For each picture `[n, 4]` frame, crop, row, column; None where no picture comes in rows.
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
    """`[rows * cols, 4]` places in row-major order."""
    row, col = torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij")
    return torch.stack([torch.zeros_like(row), torch.zeros_like(row), row, col], -1).reshape(-1, 4)
