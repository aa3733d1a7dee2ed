# SPDX-License-Identifier: Apache-2.0
"""Quality against the cost of the first token, tower included: writes `benchmarks/results/first_token-*.json`.

    python -m benchmarks.first_token --part "scenes 216" --out benchmarks/results/first_token-scenes.json
    python -m benchmarks.first_token --part "pages 240" --out benchmarks/results/first_token-pages.json

The built-in Qwen2.5-VL unpruned, on smaller pictures, with decoder methods, with cuts in the vision tower, and with
both. Prompts and metrics are those of `benchmarks.tower_quality`. The chart in docs/choosing.md shows processor time
from the model's inputs to the logits, selection included.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmarks.accuracy import header
from benchmarks.tower_quality import METHODS, PARTS, one_part
from vtprune import refvlm
from vtprune.core import default_method
from vtprune.study import progress

DECODER = (default_method.NAME, "divprune", "iwp", "pixels", "random")
RATIOS = (0.5, 0.25, 0.1)
TOWER = ("Change", "Similar")
KEEPS = (0.5, 0.35)


def variants() -> dict[str, dict[str, Any]]:
    """Name of each row to the arguments of `patch`."""
    found: dict[str, dict[str, Any]] = {"unpruned": {"ratio": 1.0}}
    found |= {f"{name} {ratio}": {"ratio": ratio, "method": name} for name in DECODER for ratio in RATIOS}
    for name in TOWER:
        for keep in KEEPS:
            found[f"{name} {keep}"] = {"ratio": 1.0, "tower": METHODS[name](keep)}
            for ratio in RATIOS:
                found[f"{name} {keep}, decoder {ratio}"] = {"ratio": ratio, "tower": METHODS[name](keep)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.first_token", description=__doc__.split("\n")[0])
    parser.add_argument("--part", choices=PARTS, required=True)
    parser.add_argument("--prompts", type=int, default=24, help="default: %(default)s")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--force", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, processor = refvlm.load(name="qwen2_5_vl")
    head = header(args.prompts, "qwen2_5_vl") | {"variants": list(variants())}
    data: dict[str, Any] = {**head, "parts": {}} | progress.load(args.out, head, args.force)
    if args.part not in data["parts"]:
        data["parts"] = {args.part: one_part(model, processor, args.part, args.prompts, variants())}
        progress.save(args.out, data)


if __name__ == "__main__":
    main()
