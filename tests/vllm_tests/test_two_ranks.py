# SPDX-License-Identifier: Apache-2.0
"""Tensor parallelism on the CPU: two ranks, each with half of the heads, select the same tokens as one."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; `make test-vllm` makes an environment with it")

from vllm_tests.test_vllm_greedy import start

pytestmark = pytest.mark.slow


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two ranks need two cores")
@pytest.mark.parametrize("method", ["iwp", "visionzip"])  # heads of the decoder, heads of the vision tower
def test_two_ranks_answer_as_one(method: str, tmp_path: Path) -> None:
    start("vllm_tests.two_ranks", tmp_path / "model", tmp_path / "result.json", method)
    result = json.loads((tmp_path / "result.json").read_text())
    assert len(result["found"]) == 7 and result["found"] == result["wanted"]
