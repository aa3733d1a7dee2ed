# SPDX-License-Identifier: Apache-2.0
"""Servers that documents start: they run on a free port, are asked one question, and end with their page."""

from __future__ import annotations

import base64
import json
import os
import re
import runpy
import socket
import sys
import time
import traceback
import urllib.request
from collections.abc import Callable
from pathlib import Path

from doc_checks import ROOT, Checked, runs_here

_PATIENCE = 120  # seconds until a server must listen
SPACE = "examples/space/app.py"
_started = 0  # the process that this call started


def started() -> int:
    """The process group of the server that this call started; 0 for none."""
    return _started


def start(name: str, run: Callable[[list[str]], int], words: list[str]) -> int:
    """Starts `run(words)` on a free port, waits until it listens, asks it something, and leaves it running.

    Raises:
        Checked: it needs packages that are not installed.
        SystemExit: it ended, did not listen, or did not answer.
    """
    global _started
    words = _with_model(words)
    if name == SPACE and not runs_here("gradio"):
        compile((ROOT / name).read_text(encoding="utf-8"), name, "exec")
        raise Checked("gradio")
    if "serve" in words and not runs_here("fastapi"):
        if Path(name).exists():
            compile(Path(name).read_text(encoding="utf-8"), name, "exec")
        pretend(words)
        raise Checked("fastapi")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    at = words.index("--port") + 1 if "--port" in words else None
    shown = words[at] if at else "8000"
    if name == SPACE:
        os.environ["GRADIO_SERVER_PORT"] = str(port)
    else:
        words = [*words[:at], str(port), *words[at + 1 :]] if at else [*words, "--port", str(port)]
    log = Path(os.environ["DOCS_NOTES"]) / f"server-{shown}.log"
    sys.stdout.flush()
    _started = os.fork()
    if _started == 0:
        _become(run, words, log)
    _await(port, log)
    ask = _ask_space if name == SPACE else _ask_example if name.startswith("examples/") else _ask_chat
    ask(name, words, port)
    _remember(shown, port)
    return 0


def pretend(words: list[str]) -> None:
    """Remembers that the port of a server that was only checked belongs to it."""
    _remember(words[words.index("--port") + 1] if "--port" in words else "8000", 0)


def redirected(words: list[str]) -> list[str]:
    """The words of `curl` with the port that the server of the page really has.

    Raises:
        Checked: the server was only checked.
        SystemExit: no server of the page has that port, the address is elsewhere, or a body is no JSON.
    """
    known = json.loads(_list().read_text()) if _list().exists() else {}
    for option, body in zip(words[:-1], words[1:], strict=True):
        if option in ("-d", "--data", "--data-raw", "--json"):  # a body, or the file that holds it
            json.loads(Path(body[1:]).read_text(encoding="utf-8") if body.startswith("@") else body)
    found = []
    for word in words:
        address = re.match(r"(?:https?://)?([\w.-]+):(\d+)(/\S*)?$", word)
        if address is None:
            if re.match(r"https?://", word):
                raise SystemExit(f"curl: {word} is not an address of this page's servers")
            found.append(word)
        elif address[1] not in ("localhost", "127.0.0.1") or address[2] not in known:
            raise SystemExit(f"curl: no server of this page is at {address[1]}:{address[2]}")
        elif not known[address[2]]:
            raise Checked("curl")
        else:
            found.append(f"http://127.0.0.1:{known[address[2]]}{address[3] or ''}")
    return found


def _with_model(words: list[str]) -> list[str]:
    """`serve NAME`: the name stands for the folder with the model."""
    if "serve" not in words:
        return list(words)
    at = words.index("serve") + 1
    return [*words[:at], os.environ["DOCS_MODEL"], *words[at + 1 :]]


def _become(run: Callable[[list[str]], int], words: list[str], log: Path) -> None:
    """In the new process: the server, until it is killed."""
    os.setsid()
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        run(words)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def _await(port: int, log: Path) -> None:
    end = time.monotonic() + _PATIENCE
    while time.monotonic() < end:
        if os.waitpid(_started, os.WNOHANG)[0]:
            break
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.05)
    raise SystemExit(f"the server did not start:\n{log.read_text(errors='replace')[-3000:]}")


def _ask_space(name: str, words: list[str], port: int) -> None:
    """The page must come; what it does is tested in a browser, by `tests/web`."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=_PATIENCE) as reply:
        assert b"vtprune" in reply.read()


def _ask_example(name: str, words: list[str], port: int) -> None:
    """As the example's own client does."""
    from vtprune import refvlm

    client = runpy.run_path(str(ROOT / name), run_name="client")
    scene = refvlm.scenes.scene(1)
    assert client["post"](f"http://127.0.0.1:{port}", scene.image, scene.questions[0].text)


def _ask_chat(name: str, words: list[str], port: int) -> None:
    """A question about a picture, as to any server of the OpenAI kind."""
    picture = base64.b64encode((Path(os.environ["DOCS_SESSION"]) / "photo.png").read_bytes()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}},
        {"type": "text", "text": "what digit is on the sign?"},
    ]
    model = words[words.index("serve") + 1]
    body = {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": 2, "stream": False}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=_PATIENCE) as reply:
        answer = json.load(reply)
    assert isinstance(answer["choices"][0]["message"]["content"], str), answer


def _list() -> Path:
    return Path(os.environ["DOCS_NOTES"]) / "servers.json"


def _remember(shown: str, port: int) -> None:
    known = json.loads(_list().read_text()) if _list().exists() else {}
    _list().write_text(json.dumps(known | {shown: port}))
