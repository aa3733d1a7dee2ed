# SPDX-License-Identifier: Apache-2.0
"""Means of repeated measurements with bootstrap intervals, as rows of results."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from vtprune.study.intervals import bootstrap


def mean_row(values: Sequence[float]) -> dict[str, Any]:
    """Mean of values and its bootstrap interval, rounded to three digits."""
    interval = [round(float(bound), 3) for bound in bootstrap(values)]
    return {"mean": round(math.fsum(values) / len(values), 3), "interval": interval}


def mean_rows(found: Sequence[dict[str, float]]) -> dict[str, dict[str, Any]]:
    """`mean_row` of every name, from one dictionary per measurement."""
    return {name: mean_row([one[name] for one in found]) for name in found[0]}
