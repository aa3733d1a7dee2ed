# SPDX-License-Identifier: Apache-2.0
"""Token budgets for the frames of a clip, or the images of a sample: an exact total, split by weight."""

from __future__ import annotations

from collections.abc import Sequence


def frame_budgets(
    weights: Sequence[float], total: int, capacity: Sequence[int], floor: int | Sequence[int] = 0
) -> list[int]:
    """Splits a budget over frames in proportion to their weights, by largest remainder.

    Every frame gets its floor, then the integer part of its share of the rest. The remainder goes one by one to the
    frames with the largest fractions, in rounds, skipping full frames; ties go to the earlier frame.

    Args:
        weights: Weight of each frame, not negative; all zero means equal.
        total: Tokens to distribute.
        capacity: Number of tokens in each frame; frames may be of unequal length.
        floor: Tokens that every frame gets first (one number, or one for each frame), limited by its capacity. Ignored
            if the floors alone exceed `total`.

    Returns:
        list[int]: Sums to `min(total, sum(capacity))`; no frame gets more than its capacity.
    """
    frames = range(len(capacity))
    total = min(total, sum(capacity))
    floors = [floor] * len(capacity) if isinstance(floor, int) else floor
    out = [min(f, c) for f, c in zip(floors, capacity, strict=True)]
    if sum(out) > total:
        out = [0] * len(capacity)
    rest, weight = total - sum(out), sum(weights)
    quota = [round(rest * w / weight if weight > 0 else rest / len(capacity), 9) for w in weights]
    out = [n + min(int(q), c - n) for n, q, c in zip(out, quota, capacity, strict=True)]
    by_fraction = sorted(frames, key=lambda i: (round(int(quota[i]) - quota[i], 9), i))
    while left := total - sum(out):
        for i in [i for i in by_fraction if out[i] < capacity[i]][:left]:
            out[i] += 1
    return out
