# SPDX-License-Identifier: Apache-2.0
"""Every check and benchmark that needs a GPU, in one command.

    python benchmarks/gpu_all.py --out DIR

Runs the kernel tests and the kernel benchmark, end-to-end latency of a model with 7 billion random parameters
(`benchmarks.latency`, with its targets), time saved by tower cuts, device synchronizations of a cut, and the tests
marked `gpu`. Logs and results go to DIR, a summary to `DIR/gpu_all.json`. The exit status is 1 if a step failed or a
target was missed. A step that cannot run (without pytest, for example) fails with its reason. An interrupted run
resumes; results of other versions in DIR are overwritten.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# If run as a script, `benchmarks/kernels.py` would shadow the Hugging Face package `kernels`.
sys.path = [str(ROOT), *(entry for entry in sys.path if Path(entry).resolve() != ROOT / "benchmarks")]

from vtprune.study import progress  # noqa: E402


def steps(out: Path, seconds: float) -> list[tuple[str, list[str]]]:
    """Name and arguments of each step, most important first."""
    python = [sys.executable, "-u", "-m"]
    pytest = [*python, "pytest", "-q", "-p", "no:cacheprovider"]
    anew = ["--out", str(out), "--force"]
    on_gpu = ["--device", "cuda", "--shape", "qwen2.5-vl-7b"]
    return [
        ("kernel_tests", [*pytest, "tests/kernel_tests", f"--junitxml={out / 'kernel_tests.xml'}"]),
        ("kernels", [*python, "benchmarks.kernels", "--device", "cuda", "--seconds", str(seconds), *anew]),
        ("latency", [*python, "benchmarks.latency", "--device", "cuda", *anew]),
        ("towers", [*python, "benchmarks.towers", *on_gpu, "--out", str(out / "towers-cuda.json")]),
        ("waits", [*python, "benchmarks.waits", "--out", str(out)]),
        ("gpu_tests", [*pytest, "-m", "gpu", "tests", f"--junitxml={out / 'gpu_tests.xml'}"]),
    ]


def run(name: str, command: list[str], out: Path, limit: float) -> dict[str, Any]:
    """Runs one step with its output in `out/<name>.log`; a step over the time limit counts as failed."""
    path = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "kernels" / "torch-ext"), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "0"}
    begin = time.perf_counter()
    log = out / f"{name}.log"
    with log.open("w") as file:
        try:
            code = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, timeout=limit
            ).returncode
        except subprocess.TimeoutExpired:
            code = None
    lines = log.read_text(errors="replace").strip().splitlines()
    return {"step": name, "exit": code, "seconds": time.perf_counter() - begin, "last": lines[-1] if lines else ""}


def go(out: Path, header: dict[str, Any], commands: dict[str, list[str]], limit: float) -> dict[str, Any]:
    """Runs all steps, or the rest of an interrupted run with the same header; writes and returns the summary."""
    out.mkdir(parents=True, exist_ok=True)
    path, end = out / "gpu_all.json", time.perf_counter() + limit
    try:
        summary = {**header, "steps": []} | progress.load(path, header)
    except progress.StaleResultError:
        summary = {**header, "steps": []}

    def one(name: str) -> dict[str, Any]:
        return run(name, commands[name], out, max(1.0, end - time.perf_counter()))

    for name, step in progress.each(summary, list(commands), one, "steps", lambda: progress.save(path, summary)):
        summary["steps"] = [old for old in summary["steps"] if old["step"] != name] + [step]
        print(f"{name:14} exit {step['exit']}  {step['seconds']:6.1f} s  {step['last']}", flush=True)
    return summary


def main() -> int:
    parser = argparse.ArgumentParser(description="Every check and benchmark that needs a GPU.")
    parser.add_argument("--out", type=Path, required=True, help="folder for logs and results")
    parser.add_argument("--seconds", type=float, default=0.5, help="seconds of repetition per kernel")
    parser.add_argument("--limit", type=float, default=540, help="seconds for all steps together")
    args = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print("gpu_all: PyTorch sees no GPU here; without one, run `pytest` and `python -m benchmarks.kernels`")
        return 1
    out = args.out.resolve()
    path, header = out / "gpu_all.json", {"device": torch.cuda.get_device_name(), "versions": progress.versions()}
    with progress.script(path):
        summary = go(out, header, dict(steps(out, args.seconds)), args.limit)
    # pytest exits with 5 if it selects no test, which is fine for marked tests.
    good = all(step["exit"] == 0 or (step["step"] == "gpu_tests" and step["exit"] == 5) for step in summary["steps"])
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
