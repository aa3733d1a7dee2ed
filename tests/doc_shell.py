# SPDX-License-Identifier: Apache-2.0
"""The shell in which the blocks of a document are run: a real bash, whose programs are stand-ins for the real ones."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from doc_processes import STAND_IN

# Programs that do something short; `doc_programs` says what. Anything else is not to be found.
PROGRAMS = (
    "accelerate", "curl", "git", "lmms-eval", "make", "pip", "pytest", "python", "python3", "transformers", "vllm",
    "vtprune",
)  # fmt: skip
# Programs that are themselves, for blocks and for recipes of make.
PLAIN = ("base64", "bash", "cat", "dirname", "env", "ls", "mkdir", "sh", "sleep", "touch", "tr", "true", "uname")
_PATIENCE = 500 if os.environ.get("VTPRUNE_DOCS") != "all" else 3000  # seconds for one block


class Programs:
    """The process that all stand-ins call, and the folder of stand-ins. One serves any number of shells."""

    def __init__(self, folder: Path) -> None:
        """Starts the process; `folder` is new and stays until `close`."""
        self.socket, self.bin = folder / "calls", folder / "bin"
        self.bin.mkdir(parents=True)
        script = folder / "stand-in"
        script.write_text(STAND_IN.format(place=str(self.socket)), encoding="utf-8")
        script.chmod(0o755)
        for name in PROGRAMS:
            (self.bin / name).symlink_to(script)
        for name in PLAIN:
            (self.bin / name).symlink_to(shutil.which(name) or "/nowhere")
        command = [sys.executable, str(Path(__file__).with_name("doc_processes.py")), str(self.socket)]
        self.log = (folder / "log").open("w")
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log, start_new_session=True
        )
        for _ in range(3000):
            if self.socket.exists():
                return
            assert self.process.poll() is None, (folder / "log").read_text()
            time.sleep(0.1)
        raise AssertionError("the programs of shell blocks did not start in five minutes")

    def close(self) -> None:
        """Ends the process, and servers that blocks have left."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.log.close()


class Shell:
    """A bash that runs one block after the other, as a reader's does; a context manager.

    Args:
        programs: what it can call.
        session: the folder in which it begins.
        model: a model in a folder, which names of models stand for.
    """

    def __init__(self, programs: Programs, session: Path, model: Path) -> None:
        self.session, self.notes = session, session.parent / f"{session.name}-calls"
        self.notes.mkdir()
        home = self.notes / "home"
        home.mkdir()
        self._log = self.notes / "calls.jsonl"
        keep = {name: os.environ[name] for name in ("LANG", "PYTHONPATH", "VTPRUNE_DOCS") if name in os.environ}
        self._environment = keep | {
            "PATH": str(programs.bin),
            "HOME": str(home),
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "DOCS_PATH": os.environ["PATH"],
            "DOCS_BIN": str(programs.bin),
            "DOCS_SESSION": str(session),
            "DOCS_NOTES": str(self.notes),
            "DOCS_MODEL": str(model),
        }
        self._count = 0

    def __enter__(self) -> Shell:
        self._bash = subprocess.Popen(
            [shutil.which("bash") or "bash", "--norc", "--noprofile", "-e", "-o", "pipefail"],
            cwd=self.session,
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        assert self._bash.stdin and self._bash.stdout
        self._bash.stdin.close()
        try:
            self._bash.wait(20)
        except subprocess.TimeoutExpired:
            self._bash.kill()
            self._bash.wait()
        self._bash.stdout.close()
        for line in self.calls():
            if "server" in line and line["server"]:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(line["server"], signal.SIGKILL)

    def calls(self) -> list[dict[str, Any]]:
        """Calls of programs so far: `shown`, `status`, and `only_checked` where it was not run."""
        return [json.loads(line) for line in self._log.read_text().splitlines()] if self._log.exists() else []

    def run(self, code: str) -> list[dict[str, Any]]:
        """Runs a block and returns its calls.

        Raises:
            AssertionError: a line is no bash, or a program failed or is not known; with all that was printed.
        """
        assert self._bash.stdin and self._bash.stdout
        self._count += 1
        block, output = self.notes / f"{self._count}.sh", self.notes / f"{self._count}.out"
        block.write_text(re.sub(r"<[a-z][a-z ]*>", "PLACEHOLDER", code), encoding="utf-8")
        syntax = subprocess.run(["bash", "-n", str(block)], text=True, capture_output=True, check=False)
        assert syntax.returncode == 0, f"{code}\n{syntax.stderr}"
        before = len(self.calls())
        line = f". '{block}' < /dev/null > '{output}' 2>&1; echo done\n"
        try:
            self._bash.stdin.write(line.encode())
            self._bash.stdin.flush()
            ready, _, _ = select.select([self._bash.stdout], [], [], _PATIENCE)
            answer = self._bash.stdout.readline() if ready else b"no end"
        except BrokenPipeError:
            answer = b""
        calls = self.calls()[before:]
        failed = [call for call in calls if call["status"]]
        said = output.read_text(encoding="utf-8", errors="replace") if output.exists() else ""
        assert answer == b"done\n" and not failed, f"{code}\n{failed or answer}\n{said[-4000:]}"
        return calls
