# SPDX-License-Identifier: Apache-2.0
"""Validity of certified ratios: writes `benchmarks/results/certify.json`.

    python -m benchmarks.certify                                  # both built-in models, 200 pictures each
    python -m benchmarks.certify --pictures 40 --models llava --out /tmp/c.json

One question per held-out scene is answered unpruned and at every candidate ratio, in batches of 32; a certificate
depends only on which answers change. Certificates are then made repeatedly on random subsets of the pictures and
evaluated on others, in two ways:

** `population`: pictures are drawn with replacement, as the test assumes, from all pictures as the population. A
  certificate is broken if the share of changed answers in the population is above the risk. The share of broken
  certificates must not exceed `1 - confidence` by more than two standard errors.
* `halves`: certificates are made on a random half and evaluated on the other: broken if its share of changed answers is
  above the risk by more than two standard errors.
"""

from __future__ import annotations

import itertools
import math
import os
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch

import vtprune
from benchmarks import command
from vtprune import refvlm
from vtprune.refvlm import evaluate
from vtprune.study import progress
from vtprune.study.certify import CANDIDATES
from vtprune.study.risk import exact_p_value

OUT = Path(__file__).resolve().parent / "results" / "certify.json"
METHODS = ("resprune", "scope", "fastv")
SETTINGS = ((0.05, 0.95), (0.1, 0.9), (0.2, 0.8))  # risk and confidence
SPLITS = 200


def changed(name: str, method: str, pictures: int) -> np.ndarray:
    """Whether the greedy answer differs from the unpruned model's, `[candidates, pictures]` bool."""
    model, processor = refvlm.load(name=name)
    samples = list(evaluate.held_out_scenes(pictures))
    reference = evaluate.answer(model, processor, samples)
    rows = []
    for ratio in CANDIDATES:
        with vtprune.patch(model, ratio=ratio, method=method):
            given = evaluate.answer(model, processor, samples)
        rows.append([now != before for now, before in zip(given, reference, strict=True)])
    return np.array(rows)


def certified(losses: np.ndarray, risk: float, confidence: float) -> int | None:
    """Index of the last candidate that losses `[candidates, n]` certify, or None."""
    n = losses.shape[1]
    p_values = (exact_p_value(int(row.sum()), n, risk) for row in losses)
    passed = len(list(itertools.takewhile(lambda p: p <= 1 - confidence, p_values)))
    return passed - 1 if passed else None


def judge(losses: np.ndarray, risk: float, confidence: float, splits: int = SPLITS) -> dict[str, Any]:
    """Share of broken certificates over random subsets of the pictures.

    Args:
        losses: `[candidates, pictures]` bool.
        risk, confidence: Parameters of the certificates.
        splits: Number of certificates per evaluation.
    """
    draw, n = np.random.default_rng(0), losses.shape[1]
    level, truth = 1 - confidence, losses.mean(1)
    error = math.sqrt(level * (1 - level) / splits)
    broken: dict[str, list[bool]] = {"population": [], "halves": []}
    found: list[float] = []
    for _ in range(splits):
        best = certified(losses[:, draw.integers(0, n, n)], risk, confidence)
        broken["population"].append(best is not None and truth[best] > risk)
        order = draw.permutation(n)
        best = certified(losses[:, order[: n // 2]], risk, confidence)
        found.append(1.0 if best is None else CANDIDATES[best])
        other = losses[:, order[n // 2 :]]
        noise = 2 * math.sqrt(risk * (1 - risk) / other.shape[1])
        broken["halves"].append(best is not None and other[best].mean() > risk + noise)
    rows: dict[str, Any] = {"risk": risk, "confidence": confidence, "splits": splits}
    for name, values in broken.items():
        share = sum(map(bool, values)) / splits
        rows[name] = {"broken": share, "allowed": round(level + 2 * error, 4), "kept": share <= level + 2 * error}
    whole = certified(losses, risk, confidence)
    rows["ratio_of_all"] = 1.0 if whole is None else CANDIDATES[whole]
    rows["ratios_of_halves"] = {f"{ratio:g}": found.count(ratio) for ratio in sorted(set(found), reverse=True)}
    return rows


def measure(models: list[str], methods: list[str], pictures: int, out: Path | None, force: bool) -> dict[str, Any]:
    """Measures every model and method that is missing in `out`."""
    torch.set_num_threads(1)
    data: dict[str, Any] = {
        "pictures": pictures,
        "candidates": list(CANDIDATES),
        "weights_sha256": {name: refvlm.weights_sha256(name) for name in models},
        "versions": progress.versions(),
        "machine": f"{os.cpu_count()} {platform.machine()} cores, float32",
    }
    old = progress.load(out, data, force)
    data["rows"] = old.get("rows", [])
    done = {(row["model"], row["method"]) for row in data["rows"]}
    jobs = [pair for pair in itertools.product(models, methods) if pair not in done]
    with progress.bar("methods", len(jobs) + len(done), len(done)) as step:
        for model, method in jobs:
            losses = changed(model, method, pictures)
            judged = [judge(losses, risk, confidence) for risk, confidence in SETTINGS]
            shares = [round(float(share), 4) for share in losses.mean(1)]
            data["rows"].append({"model": model, "method": method, "changed": shares, "certificates": judged})
            progress.save(out, data)
            step(f"{model} {method}")
    return data


def main() -> int:
    parser = command.parser("Validity of certified ratios.", OUT)
    parser.add_argument("--models", nargs="+", choices=list(refvlm.MODELS), default=list(refvlm.MODELS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--pictures", type=int, default=200)
    args = parser.parse_args()
    with progress.script(args.out):
        data = measure(args.models, args.methods, args.pictures, args.out, args.force)
    kept = True
    for row in data["rows"]:
        for found in row["certificates"]:
            both = {name: found[name] for name in ("population", "halves")}
            kept = kept and all(part["kept"] for part in both.values())
            text = ", ".join(
                f"{name} {part['broken']:.1%} (allowed {part['allowed']:.1%})" for name, part in both.items()
            )
            what = f"{row['model']} {row['method']} risk {found['risk']:g}"
            print(f"{what}: ratio {found['ratio_of_all']:g}; broken: {text}")
    print(f"written to {args.out}")
    return 0 if kept else 1


if __name__ == "__main__":
    raise SystemExit(main())
