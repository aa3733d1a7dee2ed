# SPDX-License-Identifier: Apache-2.0
"""The paths of the greedy selections on a CPU, and a quicker start of Triton's interpreter."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import types
from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="session", autouse=True)
def remembered_functions() -> Iterator[None]:
    """Remembers which functions Triton's interpreter replaces, which it otherwise looks up at every call of a kernel.

    Each look-up lists all members of a module: more than a third of the time of these tests.
    """
    if importlib.util.find_spec("triton") is None:
        yield
        return
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    @functools.cache
    def names(module: Any) -> list[str]:
        return [name for name, member in inspect.getmembers(module) if is_builtin(member)]

    def getmembers(module: Any) -> list[tuple[str, Any]]:
        found = [(name, getattr(module, name)) for name in names(module)[:1]]
        if not any(is_builtin(member) for _, member in found):  # all are replaced already, by the calling kernel
            return []
        return [(name, getattr(module, name)) for name in names(module)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "inspect", types.SimpleNamespace(**{**vars(inspect), "getmembers": getmembers}))
        yield


@pytest.fixture(params=["as it comes", "lazy"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a test with the default path, and with the lazy evaluation of large groups."""
    if request.param == "lazy":
        for operation in ("dpp_map", "progressive_mmr", "residual_pivots", "weighted_farthest_point"):
            module = importlib.import_module(f"vtprune_kernels.{operation}.vectorized")
            for rule in ("is_small", "is_small_for_isolation", "is_small_for_residuals"):
                monkeypatch.setattr(module, rule, lambda *sizes: False, raising=False)
