# SPDX-License-Identifier: Apache-2.0
"""Right answers and kept tokens of a built-in model under one method, and how far two runs keep the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import vtprune
from vtprune.core.method import Method
from vtprune.refvlm import evaluate


def answer(
    model: Any, processor: Any, samples: Sequence[Any], method: Method, ratio: float
) -> tuple[int, list[set[int]]]:
    """Number of right answers, and for every sample the prompt positions of its kept tokens."""
    right, kept = 0, []
    with vtprune.patch(model, ratio=ratio, method=method) as patch:
        for sample in samples:
            (given,) = evaluate.answer(model, processor, [sample], batch_size=1)
            right += sample.answer == given.strip()
            assert patch.last is not None
            kept.append(set(patch.last.kept[0].tolist()))
    return right, kept


def overlap(reference: list[set[int]], kept: list[set[int]]) -> float:
    """Mean share of the reference's tokens that are kept as well, rounded to four decimals."""
    shares = [len(mine & theirs) / len(mine) for mine, theirs in zip(reference, kept, strict=True)]
    return round(sum(shares) / len(shares), 4)
