# SPDX-License-Identifier: Apache-2.0
"""Test matrix of all registered methods and all families."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES
from support import LAYOUTS

from vtprune import methods


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrizes `family`, `method`, `layout` and `attention`; families outermost, so that few models are built."""
    names = metafunc.fixturenames
    if "family" in names:
        metafunc.parametrize("family", list(FAMILIES), scope="session")
    if "method" in names:
        metafunc.parametrize("method", methods.for_pictures())
    if "layout" in names:
        metafunc.parametrize("layout", list(LAYOUTS))
    if "attention" in names:
        metafunc.parametrize("attention", ["sdpa", "eager"])


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield
