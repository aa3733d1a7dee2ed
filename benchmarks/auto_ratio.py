# SPDX-License-Identifier: Apache-2.0
"""Automatic ratios by kind of picture, and their effect on accuracy: writes `benchmarks/results/auto_ratio.json`.

    python -m benchmarks.auto_ratio

** `kinds`: mean ratio of text pages, drawn scenes and uniform pictures after calibration on all of them to one mean, by
  features (`vtprune tune --auto`, `vtprune.Auto`) and by pixels as in vLLM (`PixelAuto.fit`).
* `accuracy`: right answers about held-out scenes with a ratio per picture (by features, calibrated on other scenes) and
  with one ratio for all, equal to the automatic mean on the same pictures; the difference has an interval over
  pictures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import vtprune
from benchmarks import command, kept_sets
from vtprune import refvlm
from vtprune.core.pixel_auto import PixelAuto
from vtprune.refvlm import evaluate, pages
from vtprune.study import progress
from vtprune.study.auto import calibrate
from vtprune.study.intervals import bootstrap

OUT = Path(__file__).resolve().parent / "results" / "auto_ratio.json"
KINDS_MEAN, MEANS = 0.2, (0.1, 0.05)
METHODS = ("resprune", "divprune")
LEAST, MOST = 0.02, 0.5
SIDE = 144  # side of a picture in pixels


def flat(seed: int) -> Image.Image:
    """A picture of one color."""
    return Image.new("RGB", (SIDE, SIDE), tuple(np.random.default_rng(seed).integers(0, 256, 3).tolist()))


def pictures(count: int) -> dict[str, list[Image.Image]]:
    """`count` pictures of each kind."""
    return {
        "pages": [pages.page(seed, (12, 12)).image.resize((SIDE, SIDE)) for seed in range(count)],
        "scenes": [sample.image for sample in evaluate.held_out_scenes(count)],
        "flat": [flat(seed) for seed in range(count)],
    }


def calibrated(model: Any, processor: Any, images: Sequence[Image.Image], mean: float) -> tuple[Any, list[float]]:
    """The `Auto` with this mean ratio, and the ratio of every picture."""
    prompts = [
        processor(images=image, text=refvlm.prompt("how many objects are there?"), return_tensors="pt")
        for image in images
    ]
    return calibrate(model, prompts, mean, LEAST, MOST)


def of_kinds(model: Any, processor: Any, count: int) -> list[dict[str, Any]]:
    """Mean ratio of every kind of picture, by features and by pixels."""
    found = pictures(count)
    images = [image for kind in found.values() for image in kind]
    auto, by_features = calibrated(model, processor, images, KINDS_MEAN)
    pixels = PixelAuto(mean=KINDS_MEAN, min=LEAST, max=MOST).fit(images)
    by_pixels = [pixels.ratio(image) for image in images]
    rows = []
    for rule, setting, shares in (("features", auto.energy, by_features), ("pixels", pixels.typical, by_pixels)):
        means = [math.fsum(shares[at : at + count]) / count for at in range(0, len(shares), count)]
        row: dict[str, Any] = {"rule": rule, "setting": setting, "mean": round(sum(shares) / len(shares), 4)}
        rows.append(row | {kind: round(share, 4) for kind, share in zip(found, means, strict=True)})
    return rows


def of_accuracy(model: Any, processor: Any, questions: int, count: int) -> list[dict[str, Any]]:
    """Right answers with and without an automatic ratio, for each method and mean."""
    samples = list(evaluate.held_out_scenes(questions + count))
    asked, others = samples[:questions], [sample.image for sample in samples[questions:]]
    rows = []
    for mean in MEANS:
        auto, _ = calibrated(model, processor, others, mean)
        for name in METHODS:
            method = vtprune.methods.get(name)()
            by_auto, kept = kept_sets.answer(model, processor, asked, method, auto)
            counts = [len(columns) for columns in kept]
            share = sum(counts) / len(counts) / refvlm.VISUAL_TOKENS
            by_one, _ = kept_sets.answer(model, processor, asked, method, share)
            gains = [float(a) - float(b) for a, b in zip(by_auto, by_one, strict=True)]
            rows.append(
                {
                    "method": name,
                    "mean_asked": mean,
                    "mean": round(share, 4),
                    "kept_least": min(counts),
                    "kept_most": max(counts),
                    "right_auto": sum(by_auto),
                    "right_one": sum(by_one),
                    "total": len(asked),
                    "gain": round(sum(gains) / len(gains), 4),
                    "interval": [round(bound, 4) for bound in bootstrap(gains)],
                }
            )
    return rows


def main() -> None:
    parser = command.parser("What automatic ratios keep and gain.", OUT)
    parser.add_argument("--models", nargs="+", choices=list(refvlm.MODELS), default=list(refvlm.MODELS))
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--pictures", type=int, default=40, help="pictures of every kind, and for calibration")
    args = parser.parse_args()
    header = {
        "questions": args.questions,
        "pictures": args.pictures,
        "weights_sha256": {name: refvlm.weights_sha256(name) for name in args.models},
        "versions": progress.versions(),
    }

    def run(name: str) -> dict[str, Any]:
        model, processor = refvlm.load(name=name)
        accuracy = of_accuracy(model, processor, args.questions, args.pictures)
        return {"kinds": of_kinds(model, processor, args.pictures), "accuracy": accuracy}

    for name, found in command.fill(args, header, "models", args.models, run).items():
        for row in [*found["kinds"], *found["accuracy"]]:
            print(name, row)


if __name__ == "__main__":
    main()
