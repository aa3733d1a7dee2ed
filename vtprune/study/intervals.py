# SPDX-License-Identifier: Apache-2.0
"""95 % confidence intervals of measured shares and means."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence

import numpy as np

RESAMPLES = 2000


def wilson(right: float, total: float, z: float = 1.96) -> tuple[float, float]:
    """The 95 % Wilson score interval of a share: `(low, high)`.

    Unlike a bootstrap interval it has a width above 0 where all of `total` are right. `right` may be a sum of shares.
    """
    if total == 0:
        return 0.0, 1.0
    share = right / total
    middle = share + z * z / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


def group_means(values: Sequence[float], groups: Sequence[Hashable]) -> np.ndarray:
    """Means of `values` by group, in order of first appearance: float64 `[number of groups]`."""
    sums: dict[Hashable, list[float]] = {}
    for value, group in zip(values, groups, strict=True):
        sums.setdefault(group, []).append(value)
    return np.array([math.fsum(part) / len(part) for part in sums.values()])


def bootstrap(
    values: Sequence[float] | np.ndarray,
    statistic: Callable[..., np.ndarray] = np.mean,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of a statistic: `(low, high)`.

    Args:
        values: Independent observations; average several of one picture first (`group_means`).
        statistic: A function that takes `axis=1`, such as `np.mean` or `np.median`.
        resamples: Number of resamples.
        seed: Seed of a generator of its own, so that the same values give the same interval.

    Returns:
        tuple: For a single value, the statistic itself twice.
    """
    values = np.asarray(values, dtype=np.float64)
    drawn = np.random.default_rng(seed).integers(0, len(values), (resamples, len(values)))
    low, high = np.quantile(statistic(values[drawn], axis=1), (0.025, 0.975))
    return float(low), float(high)
