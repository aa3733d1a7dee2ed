# SPDX-License-Identifier: Apache-2.0
"""The paths of the greedy selections on a CPU."""

from __future__ import annotations

import importlib

import pytest


@pytest.fixture(params=["as it comes", "lazy"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a test with the default path, and with the lazy evaluation of large groups."""
    if request.param == "lazy":
        for operation in ("dpp_map", "progressive_mmr", "residual_pivots", "weighted_farthest_point"):
            module = importlib.import_module(f"vtprune_kernels.{operation}.vectorized")
            for rule in ("is_small", "is_small_for_isolation", "is_small_for_residuals"):
                monkeypatch.setattr(module, rule, lambda *sizes: False, raising=False)
