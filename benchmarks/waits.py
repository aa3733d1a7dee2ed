# SPDX-License-Identifier: Apache-2.0
"""Device synchronizations of a pruned prefill by line of code: writes `DIR/waits.json`.

    python -m benchmarks.waits --out DIR

A synchronization drains the launch queue, which hides the host's overhead, so there should be few. PyTorch reports each
one; those of the unpruned prefill are the model's own. Needs a GPU.
"""

from __future__ import annotations

import argparse
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import vtprune
from vtprune import refvlm
from vtprune.refvlm import loading
from vtprune.study import progress

ROOT = Path(__file__).resolve().parent.parent
METHODS = ("iwp", "divprune", "fastv", "cdpruner", "zoo_prune", "random")


def count(run: Callable[[], Any]) -> dict[str, int]:
    """Synchronizations of a call by `file:line`; those outside this project by file."""
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    return dict(Counter(place(w.filename, w.lineno) for w in caught if "synchronizing" in str(w.message)))


def place(file: str, line: int) -> str:
    path = Path(file)
    return f"{path.relative_to(ROOT)}:{line}" if path.is_relative_to(ROOT) else path.name


def measure(methods: tuple[str, ...], device: str) -> list[dict[str, Any]]:
    """One prefill of the built-in model unpruned and with each method, each after a warm-up."""
    model, processor = loading.model_and_processor(loading.EMBEDDED, device, "bfloat16")
    scene = refvlm.scenes.scene(0)
    inputs = loading.prompt(processor, scene.image, scene.questions[0].text).to(model.device)
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)

    def prefill() -> Any:
        with torch.no_grad():
            return model(**inputs)

    prefill()
    rows = [{"method": None, "waits": count(prefill)}]
    for name in methods:
        with vtprune.patch(model, ratio=0.1, method=name):
            prefill()
            rows.append({"method": name, "waits": count(prefill)})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description="Where a pruned prefill waits for the GPU.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the result file")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("waits: PyTorch sees no GPU here")
        return 1
    path = args.out / "waits.json"
    data = {"device": torch.cuda.get_device_name(), "versions": progress.versions()}
    with progress.script(path):
        data["rows"] = measure(tuple(args.methods), "cuda")
        progress.save(path, data)
    own = sum(data["rows"][0]["waits"].values())
    for row in data["rows"]:
        print(f"{row['method'] or 'unpruned':12} {sum(row['waits'].values()):3} waits, the model's own {own}")
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
