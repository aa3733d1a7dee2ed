# SPDX-License-Identifier: Apache-2.0
"""Learn then Test: settings whose risk is below a limit, with a given probability.

Angelopoulos, Bates, Candes, Jordan and Lei, "Learn then Test" (arXiv 2110.01052): every setting has a p-value for the
hypothesis that its risk is above the limit. Settings are tested in a fixed order, each at the full level, until the
first is not rejected; with the given probability, the risk of all rejected ones is below the limit. Nothing is assumed
about how the risk depends on the setting.
"""

from __future__ import annotations

import math


def binomial_cdf(k: int, n: int, p: float) -> float:
    """Probability of at most `k` successes in `n` trials of probability `p`."""
    if k >= n:
        return 1.0
    if k < 0:
        return 0.0
    logs = [
        math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) + i * math.log(p) + (n - i) * math.log1p(-p)
        for i in range(k + 1)
    ]
    top = max(logs)
    return min(1.0, math.exp(top) * math.fsum(math.exp(value - top) for value in logs))


def p_value(mean_loss: float, n: int, risk: float) -> float:
    """The Hoeffding-Bentkus p-value of the hypothesis that the expected loss is above `risk`.

    Args:
        mean_loss: Mean of `n` independent losses in [0, 1].
        n: Number of losses.
        risk: The limit, in (0, 1).
    """
    if mean_loss >= risk:
        return 1.0
    hoeffding = math.exp(-n * _divergence(mean_loss, risk))
    bentkus = math.e * binomial_cdf(math.ceil(n * mean_loss - 1e-9), n, risk)
    return min(1.0, hoeffding, bentkus)


def exact_p_value(changes: int, n: int, risk: float) -> float:
    """`p_value` for losses that are 0 or 1, as the binomial tail, which is never larger."""
    return 1.0 if changes >= n * risk else binomial_cdf(changes, n, risk)


def _divergence(a: float, b: float) -> float:
    """Kullback-Leibler divergence of two Bernoulli distributions, in nats."""
    first = a * math.log(a / b) if a > 0 else 0.0
    return first + ((1 - a) * math.log((1 - a) / (1 - b)) if a < 1 else 0.0)


def pictures_needed(share: float, risk: float, level: float, most: int = 1_000_000) -> int | None:
    """Smallest number of pictures with which a share of changed answers would be certified.

    Args:
        share: Expected share of changed answers.
        risk, level: Limits of the share and of the p-value.
        most: Limit of the search.

    Returns:
        int: None where `share` is not below `risk`, or more than `most` pictures would be needed.
    """
    if share >= risk:
        return None
    low, high = 0, 1
    while p_value(share, high, risk) > level:
        low, high = high, 2 * high
        if low > most:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if p_value(share, middle, risk) <= level else (middle, high)
    return high
