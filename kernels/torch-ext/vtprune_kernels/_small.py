# SPDX-License-Identifier: Apache-2.0
"""Which groups are small enough that all pairs at once cost less than lazy evaluation, on a CPU."""

from __future__ import annotations

_ALWAYS, _LARGEST = 192, 1024
# Multiplications of the matrix of all pairs that a pick by lazy evaluation costs as much as, in the median of
# `benchmarks/small_pools.py`; the first pick of the farthest-point choice alone costs as much as the second number.
_A_PICK, _A_FIRST_PICK = 2_500_000, 2_500_000_000


def is_small(rows: int, width: int, picks: int) -> bool:
    """Whether the products of all pairs of rows cost no more than `picks` picks by lazy evaluation.

    Args:
        rows: Rows of the group.
        width: Multiplications for a pair of rows.
        picks: Rows to choose.
    """
    return rows <= _ALWAYS or (rows <= _LARGEST and rows * rows * width <= _A_PICK * picks)


def is_small_for_isolation(rows: int, width: int) -> bool:
    """Whether the products of all pairs cost no more than finding the most isolated row by lazy evaluation."""
    return rows <= _LARGEST and rows * rows * width <= _A_FIRST_PICK
