# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the web tests: the demo server on this machine. `make test-web` runs this folder."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from web_support import ROOT, SPACE, missing


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = missing()
    if reason is not None:
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=reason))


@dataclass
class Server:
    """A running demo.

    Attributes:
        url: Base URL.
        temp: Its temporary folder, the only one that it may write to.
        cwd: Its working directory.
    """

    url: str
    temp: Path
    cwd: Path
    process: subprocess.Popen


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The demo with two models: the embedded Qwen2.5-VL, and the embedded LLaVA from its folder."""
    from vtprune import refvlm

    home = tmp_path_factory.mktemp("space")
    temp, cwd = home / "temp", home / "cwd"
    temp.mkdir()
    cwd.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    sources = [str(ROOT), str(ROOT / "kernels" / "torch-ext"), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_SERVER_NAME": "127.0.0.1",
        "GRADIO_TEMP_DIR": str(temp),
        "GRADIO_ANALYTICS_ENABLED": "False",
        "HF_HUB_OFFLINE": "1",
        "VTPRUNE_MODELS": f"embedded-qwen2_5_vl,{refvlm.WEIGHTS}",
        "VTPRUNE_MAX_NEW_TOKENS": "8",
        "VTPRUNE_REPEATS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": os.pathsep.join(sources),
    }
    log = (home / "log.txt").open("w")
    process = subprocess.Popen([sys.executable, str(SPACE / "app.py")], cwd=cwd, env=env, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 300
        while True:
            try:
                urllib.request.urlopen(url, timeout=5).read()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    pytest.fail(f"the demo did not start:\n{(home / 'log.txt').read_text()[-2000:]}")
                time.sleep(0.5)
        yield Server(url, temp, cwd, process)
        assert process.poll() is None, "the demo process ended"
    finally:
        process.terminate()
        process.wait(30)
        log.close()
