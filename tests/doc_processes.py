# SPDX-License-Identifier: Apache-2.0
"""Programs that shell blocks call, each in a process of its own, without paying for its imports again.

    python tests/doc_processes.py SOCKET

imports what most programs need, and forks for every call that arrives at the socket. A call comes from a stand-in, a
small script under the name of a program on the PATH of the shell: it sends its words, its folder, its environment and
its open files, and ends with the exit status that is sent back. What the call then does is `doc_programs.call`.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import sys
import traceback
from pathlib import Path

_LENGTH = 8  # bytes that say how long the call is

STAND_IN = f"""#!{sys.executable} -IS
import json, os, socket, sys
call = json.dumps([os.path.basename(sys.argv[0]), sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
server = socket.socket(socket.AF_UNIX)
server.connect({{place!r}})
socket.send_fds(server, [len(call).to_bytes({_LENGTH}, "big")], [0, 1, 2])
server.sendall(call)
status = server.recv(1)
sys.exit(status[0] if status else 70)  # without an answer it has died
"""


def serve(place: str) -> None:
    """Answers calls until it is killed. Calls may overlap."""
    import doc_checks
    import doc_programs
    import transformers  # noqa: F401

    from vtprune import refvlm
    from vtprune.cli.main import build_parser

    refvlm.load(), build_parser()  # what they import when they are used
    if doc_checks.runs_here("lmms_eval"):
        importlib.import_module("lmms_eval.__main__")
        importlib.import_module("vtprune.integrations.lmms_eval.model")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children
    server = socket.socket(socket.AF_UNIX)
    server.bind(f"{place}.new")
    server.listen()
    os.rename(f"{place}.new", place)  # who finds it can call
    while True:
        caller, _ = server.accept()
        if os.fork() == 0:
            server.close()
            os._exit(_answer(caller, doc_programs.call))
        caller.close()


def _answer(caller: socket.socket, call) -> int:
    """In the child: becomes the called program."""
    status = 70
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        size, files, _, _ = socket.recv_fds(caller, _LENGTH, 3)
        text = b""
        while len(text) < int.from_bytes(size, "big"):
            text += caller.recv(1 << 16)
        program, words, folder, environment = json.loads(text)
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        status = call(program, words)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        caller.sendall(bytes([status % 256]))
    return status


if __name__ == "__main__":
    # The folder of this file is on the path by itself; the library may not be installed.
    root = Path(__file__).resolve().parent.parent
    sys.path[:0] = [str(root), str(root / "kernels" / "torch-ext")]
    serve(sys.argv[1])
