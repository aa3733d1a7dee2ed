# SPDX-License-Identifier: Apache-2.0
"""Accuracy and time of ZOO-Prune's estimators on real projector shapes: writes `results/zoo_sensitivity.json`.

    python -m benchmarks.zoo_sensitivity

Random weights in the shapes of LLaVA-1.5-7B and InternVL-1B, and of a patch merger (four patches per token, each with
RMS norm) at a quarter of the width of Qwen2.5-VL's; 144 tokens of different norms, float32, 64 directions, interleaved
in one run. The reference is the derivative over 256 directions with activation slopes in float64. Projectors are
written one by one, an interrupted benchmark resumes, and results of another version are overwritten only with
`--force`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import vtprune
from vtprune.methods.zoo_prune.sensitivity import (
    difference_sensitivity,
    exact_sensitivity,
    jvp_sensitivity,
    norm_forms,
    normed_sensitivity,
    quadratic_form,
    slope_along,
    unit_directions,
)
from vtprune.study import progress

OUT = Path(__file__).resolve().parent / "results" / "zoo_sensitivity.json"
SHAPES = {
    "llava-1.5-7b": (144, 1024, 4096, 4096),
    "internvl-1b": (144, 4096, 896, 896),
    "patch-merger": (144, 4 * 320, 1280, 512),
}
PATCHES = {"patch-merger": 4}  # patches per token, normalized individually
DIRECTIONS = 64


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation."""
    ranks = torch.stack([x.argsort().argsort().double() for x in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


def seconds(function: Callable[[], Any], runs: int) -> float:
    """Median time of `runs` calls in seconds; the caller warms up."""
    times = []
    for _ in range(runs):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def measure(name: str, runs: int) -> dict[str, Any]:
    """One projector shape."""
    tokens, d_in, width, d_out = SHAPES[name]
    generator = torch.Generator().manual_seed(0)
    first, second = nn.Linear(d_in, width), nn.Linear(width, d_out)
    for linear in (first, second):
        linear.weight.data.normal_(0, linear.in_features**-0.5, generator=generator)
        linear.bias.data.normal_(0, 0.1, generator=generator)
    x = torch.randn(tokens, d_in, generator=generator) * torch.rand(tokens, 1, generator=generator).mul(3).exp()
    directions = unit_directions(torch.randn(DIRECTIONS, d_in, generator=generator))
    act, patches = nn.functional.gelu, PATCHES.get(name)
    norm = nn.RMSNorm(d_in // (patches or 1), eps=1e-6)
    norm.weight.data.normal_(1, 0.3, generator=generator)

    def front(z: Tensor) -> Tensor:
        return z if patches is None else norm(z.unflatten(-1, (patches, -1))).flatten(-2)

    def project(z: Tensor) -> Tensor:
        return second(act(first(front(z))))

    w1, b1, w2 = first.weight, first.bias, second.weight
    form, forms = quadratic_form(w1, w2), [] if patches is None else norm_forms(w1, w2, norm)
    estimators = {
        "difference": lambda: difference_sensitivity(project, x, directions, 0.01),
        "jvp": lambda: jvp_sensitivity(project, x, directions),
        "exact": lambda: (
            exact_sensitivity(x, w1, b1, act, form)
            if patches is None
            else normed_sensitivity(x.unflatten(-1, (patches, -1)), norm, w1, b1, act, w2, forms)
        ),
    }
    many = unit_directions(torch.randn(256, d_in, generator=generator, dtype=torch.float64))
    # With known activation slopes g, the derivative along u (after the norm) is W2 (g * (W1 u)).
    exactly = norm.double(), first.double()
    slopes = slope_along(act, first(front(x.double())), torch.ones(tokens, width, dtype=torch.float64))
    reference = torch.zeros(tokens, dtype=torch.float64)
    for u in many:
        behind = u if patches is None else slope_along(front, x.double(), u.expand(x.shape).contiguous())
        reference += ((slopes * (behind @ first.weight.T)).float() @ second.weight.T).double().norm(dim=1)
    for module in exactly:
        module.float()
    rows = {key: function() for key, function in estimators.items()}
    times = {key: seconds(function, runs) for key, function in estimators.items()}
    return {
        "projector": name,
        "shape": SHAPES[name],
        "rank_correlation_with_reference": {k: round(rank_correlation(v, reference), 4) for k, v in rows.items()},
        "rank_correlation_exact_with_difference": round(rank_correlation(rows["exact"], rows["difference"]), 4),
        "time_over_exact": {k: round(t / times["exact"], 1) for k, t in times.items()},
    }


@torch.no_grad()
def run(names: list[str], runs: int, out: Path, force: bool = False) -> dict[str, Any]:
    """Measures the projectors that are missing in `out`; writes it after each.

    Raises:
        StaleResultError: `out` holds results of another version, machine or number of runs.
    """
    data: dict[str, Any] = {
        "directions": DIRECTIONS,
        "runs": runs,
        "versions": {"vtprune": vtprune.__version__, "torch": torch.__version__},
        "machine": f"{os.cpu_count()} {platform.machine()} cores, {torch.get_num_threads()} threads, float32",
    }
    data["rows"] = progress.load(out, data, force).get("rows", [])
    done = {row["projector"] for row in data["rows"]}
    left = [name for name in names if name not in done]
    for _, row in progress.work(left, lambda name: measure(name, runs), "projectors", done=len(names) - len(left)):
        data["rows"].append(row)
        progress.save(out, data)
        print(json.dumps(row), flush=True)
    return data


def main() -> None:
    parser = argparse.ArgumentParser(description="ZOO-Prune's estimators on real projector shapes.")
    parser.add_argument("--projectors", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--force", action="store_true", help="start again, and overwrite existing results")
    args = parser.parse_args()
    with progress.script(args.out):
        run(args.projectors, args.runs, args.out, args.force)
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
