# SPDX-License-Identifier: Apache-2.0
"""Interrupted generations leave no effect; `make soak` covers every method and family, and real signals."""

from __future__ import annotations

import pytest
from interrupted import check_every_call, check_interrupted


@pytest.mark.parametrize(
    ("family", "method"), [("llava", "iwp"), ("llava_next", "vflowopt"), ("qwen3_vl", "sparsevlm")]
)
def test_interrupted(family: str, method: str) -> None:
    assert check_interrupted(family, method) == 12


@pytest.mark.parametrize("method", ["iwp", "dart"])
def test_an_interruption_at_any_place_of_the_attention_probe(method: str) -> None:
    assert check_every_call("llava", method, "attention_probe.py") > 50
