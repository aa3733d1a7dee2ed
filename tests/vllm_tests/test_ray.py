# SPDX-License-Identifier: Apache-2.0
"""A batch job over a folder with Ray Data: two vLLM engines side by side, of which one is killed in the middle."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("vllm", reason="vLLM is not installed; `make test-vllm` makes an environment with it")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not importlib.util.find_spec("ray"), reason="Ray is not installed; `make test-vllm` installs it"
    ),
]
ROOT = Path(__file__).resolve().parents[2]
PICTURES, PATIENCE = 240, 900


def _engines(job: Any) -> list[Any]:
    """Processes of vLLM's engines below a process; others may end while they are listed."""
    import psutil

    found = []
    for process in job.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            found += [process] if "EngineCore" in process.name() else []
    return found


def test_no_picture_is_lost_or_answered_twice_when_an_engine_dies(tmp_path: Path) -> None:
    import psutil
    from vllm_tests import models

    models.idefics3(tmp_path / "model")
    folder, out = tmp_path / "pictures", tmp_path / "answers.jsonl"
    folder.mkdir()
    for number in range(PICTURES):
        Image.new("RGB", (96, 64), (number, 255 - number, 99)).save(folder / f"{number:03}.png")
    (folder / "broken.png").write_bytes(b"no picture")
    command = [sys.executable, str(ROOT / "examples" / "ray_batch.py"), "--cpu", "--model", str(tmp_path / "model")]
    command += ["--images", str(folder), "--question", "word1", "--out", str(out), "--workers", "2"]
    command += ["--batch", "2", "--max-tokens", "200", "--max-model-len", "1024"]
    paths = [ROOT, ROOT / "kernels" / "torch-ext", ROOT / "tests", ROOT / "tests" / "vllm_tests" / "torchvision_ops"]
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([*map(str, paths), os.environ.get("PYTHONPATH", "")]),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "OMP_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DATA_DEFAULT_WAIT_FOR_MIN_ACTORS_S": "600",  # the first engine does not begin before the second is there
    }
    killed = side_by_side = 0
    with open(tmp_path / "log.txt", "w+") as log:
        job = subprocess.Popen(command, env=env, stdout=log, stderr=log)
        try:
            end = time.monotonic() + PATIENCE
            while job.poll() is None and time.monotonic() < end:
                engines = _engines(psutil.Process(job.pid))
                side_by_side = max(side_by_side, len(engines))
                if not killed and len(engines) == 2 and out.exists() and out.read_text().count("\n") >= 2:
                    engines[0].kill()  # in the middle of its requests
                    killed = out.read_text().count("\n")
                time.sleep(0.2)
            rc = job.wait(1)
        finally:
            for process in [*psutil.Process(job.pid).children(recursive=True), job] if job.poll() is None else []:
                process.kill()
        log.seek(0)
        message = log.read()
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert 0 < killed < PICTURES and side_by_side == 2, message[-3000:]
    good = Counter(row["picture"] for row in rows if not row["error"])
    assert good == Counter(f"{number:03}.png" for number in range(PICTURES)), message[-3000:]
    assert [row["picture"] for row in rows if row["error"]] == ["broken.png"]
    assert rc == 1 and f"{PICTURES} of {PICTURES + 1} pictures answered, each once" in message
    # 3 x 2 tiles of 16 tokens and a thumbnail, of which a quarter stays.
    assert all(row["prompt_tokens"] < 200 for row in rows if not row["error"])
