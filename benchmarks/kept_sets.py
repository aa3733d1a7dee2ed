# SPDX-License-Identifier: Apache-2.0
"""Right answers and kept tokens of a built-in model under one method, and the overlap of two kept sets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import vtprune
from vtprune.core.method import Method
from vtprune.refvlm import evaluate

BATCH = 32


def answer(
    model: Any, processor: Any, samples: Sequence[Any], method: Method, ratio: float | vtprune.Auto
) -> tuple[list[bool], list[set[int]]]:
    """Whether each answer is right, and the positions of each sample's kept tokens in its batch's padded prompts."""
    right: list[bool] = []
    kept: list[set[int]] = []
    with vtprune.patch(model, ratio=ratio, method=method) as patch:
        for start in range(0, len(samples), BATCH):
            part = samples[start : start + BATCH]
            given = evaluate.answer(model, processor, part, BATCH)
            right += [sample.answer == text for sample, text in zip(part, given, strict=True)]
            assert patch.last is not None
            kept += [set(columns.tolist()) for columns in patch.last.kept]
    return right, kept


def overlap(reference: list[set[int]], kept: list[set[int]]) -> float:
    """Mean share of the reference's tokens that are also in `kept`, rounded to four decimals."""
    shares = [len(mine & theirs) / len(mine) for mine, theirs in zip(reference, kept, strict=True)]
    return round(sum(shares) / len(shares), 4)
