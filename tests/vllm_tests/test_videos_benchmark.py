# SPDX-License-Identifier: Apache-2.0
"""The vLLM clip benchmark on one clip: engines of the plug-in and of vLLM keep equal numbers of tokens."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; `make test-vllm` makes an environment with it")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def test_engines_are_compared_at_equal_counts(tmp_path: Path) -> None:
    out = tmp_path / "videos.json"
    command = [sys.executable, "-m", "benchmarks.vllm_videos", "--clips", "1", "--out", str(out)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    data = json.loads(out.read_text())
    dropped = data["visual_tokens"] - round(data["share"] * data["visual_tokens"])
    for model in data["models"]:
        whole, *pruned = model["rows"]
        assert (whole["engine"], whole["kl"], whole["same"], whole["time"]) == ("unpruned", 0, 1, 1)
        assert {row["tokens"] for row in pruned} == {whole["tokens"] - dropped}, model["model"]
        assert all(row["kl"] > 0 for row in pruned) and any(row["engine"] == "vLLM: evs" for row in pruned)
