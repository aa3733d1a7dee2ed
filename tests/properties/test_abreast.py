# SPDX-License-Identifier: Apache-2.0
"""Generations in threads equal serial ones; `make soak` runs this with every method on every family."""

from __future__ import annotations

from typing import Any

import pytest
from abreast import check_threads

ONE: list[dict[str, Any]] = [{"method": "sparsevlm", "ratio": 0.3}]
TWO: list[dict[str, Any]] = [{"method": "iwp", "ratio": 0.3}, {"method": "visionzip", "keep": 5}]


@pytest.mark.parametrize("recipes", [ONE, TWO], ids=["one model", "two models"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_threads(family: str, recipes: list[dict[str, Any]]) -> None:
    check_threads(family, recipes)


def test_derivatives_in_threads() -> None:
    """SmolVLM's projector is differentiated in threads, though PyTorch has one global forward-mode level."""
    check_threads("smolvlm", [{"method": "zoo_prune", "ratio": 0.3}])
