# SPDX-License-Identifier: Apache-2.0
"""95 % confidence intervals of measured shares and means."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence

import numpy as np

_RESAMPLES = 2000
_Z = 1.96  # the normal distribution's quantile of 97.5 %


def wilson(right: float, total: float) -> tuple[float, float]:
    """The 95 % Wilson score interval of a share: `(low, high)`.

    Unlike a bootstrap interval it has a width above 0 where all of `total` are right. `right` may be a sum of shares.
    """
    if total == 0:
        return 0.0, 1.0
    share = right / total
    middle = share + _Z * _Z / (2 * total)
    spread = _Z * math.sqrt(share * (1 - share) / total + _Z * _Z / (4 * total * total))
    scale = 1 + _Z * _Z / total
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


def group_means(values: Sequence[float], groups: Sequence[Hashable]) -> np.ndarray:
    """Means of `values` by group, in order of first appearance: float64 `[number of groups]`."""
    sums: dict[Hashable, list[float]] = {}
    for value, group in zip(values, groups, strict=True):
        sums.setdefault(group, []).append(value)
    return np.array([math.fsum(part) / len(part) for part in sums.values()])


def bootstrap(
    values: Sequence[float] | np.ndarray, statistic: Callable[..., np.ndarray] = np.mean
) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of a statistic: `(low, high)`; the same values give the same interval.

    Args:
        values: Independent observations; average several of one picture first (`group_means`).
        statistic: A function that takes `axis=1`, such as `np.mean` or `np.median`.

    Returns:
        tuple: For a single value, the statistic itself twice.
    """
    values = np.asarray(values, dtype=np.float64)
    drawn = np.random.default_rng(0).integers(0, len(values), (_RESAMPLES, len(values)))
    low, high = np.quantile(statistic(values[drawn], axis=1), (0.025, 0.975))
    return float(low), float(high)
