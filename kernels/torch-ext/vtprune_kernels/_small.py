# SPDX-License-Identifier: Apache-2.0
"""Sizes of groups for which a matrix of all pairs is faster than lazy evaluation on a CPU."""

from __future__ import annotations

_ALWAYS, _LARGEST = 192, 1024
# Cost of a pick by lazy evaluation, in multiplications of the matrix of all pairs (medians of
# `benchmarks/small_pools.py`); and the cost of the first pick of farthest-point selection.
_A_PICK, _A_FIRST_PICK = 2_500_000, 2_500_000_000
# The same for residual selection, measured in the same way.
_LARGEST_OF_RESIDUALS, _A_RESIDUAL_PICK = 2304, 5_000_000


def is_small(rows: int, width: int, picks: int, largest: int = _LARGEST, a_pick: int = _A_PICK) -> bool:
    """Whether the products of all pairs of rows cost no more than `picks` picks by lazy evaluation.

    Args:
        rows: Number of rows in the group.
        width: Number of multiplications for a pair of rows.
        picks: Number of rows to select.
        largest: Rows of the largest group for which it may hold.
        a_pick: Cost of a pick by lazy evaluation, in multiplications.
    """
    return rows <= _ALWAYS or (rows <= largest and rows * rows * width <= a_pick * picks)


def is_small_for_residuals(rows: int, width: int, picks: int) -> bool:
    """Same as `is_small`, for residual selection."""
    return is_small(rows, width, picks, _LARGEST_OF_RESIDUALS, _A_RESIDUAL_PICK)


def is_small_for_isolation(rows: int, width: int) -> bool:
    """Whether the products of all pairs cost no more than finding the most isolated row by lazy evaluation."""
    return rows <= _LARGEST and rows * rows * width <= _A_FIRST_PICK
