# SPDX-License-Identifier: Apache-2.0
"""Interrupted generations leave no effect; `make soak` covers every method and family, and real signals."""

from __future__ import annotations

import pytest
from interrupted import check_interrupted


@pytest.mark.parametrize(
    ("family", "method"), [("llava", "iwp"), ("llava_next", "vflowopt"), ("qwen3_vl", "sparsevlm")]
)
def test_interrupted(family: str, method: str) -> None:
    assert check_interrupted(family, method) == 12
