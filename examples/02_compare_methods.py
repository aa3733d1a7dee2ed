# SPDX-License-Identifier: Apache-2.0
"""Compares methods at equal cost: change of the next-token distribution, and right answers.

python examples/02_compare_methods.py --questions 200 --methods iwp divprune fastv
"""

from __future__ import annotations

import argparse

import vtprune
from vtprune import refvlm
from vtprune.refvlm import evaluate
from vtprune.study.compare import compare


def main() -> None:
    parser = argparse.ArgumentParser(description="Compares methods at equal cost on the built-in model.")
    parser.add_argument("--methods", nargs="+", default=["iwp", "divprune"])
    parser.add_argument("--questions", type=int, default=12)
    parser.add_argument("--mean-ratio", type=float, default=0.6, help="mean share of visual tokens over the layers")
    args = parser.parse_args()

    model, processor = refvlm.load()
    samples = list(evaluate.held_out_scenes(args.questions))
    batch = processor(
        images=[sample.image for sample in samples],
        text=[refvlm.prompt(sample.question) for sample in samples],
        return_tensors="pt",
        padding=True,
    )

    print(f"{len(samples)} questions, mean ratio {args.mean_ratio:g}; random and uniform are always shown")
    print(f"{'method':<12} {'kept':>6} {'KL (nats)':>10} {'right':>6}")
    print(f"{'unpruned':<12} {refvlm.VISUAL_TOKENS:>6} {0:>10.4f} {_right(model, processor, samples):>6}")
    for row in compare(model, [batch], args.mean_ratio, args.methods, repeats=1):
        if row.reason is not None:
            print(f"{row.method:<12} not possible: {row.reason}")
            continue
        with vtprune.patch(model, mean_ratio=args.mean_ratio, method=row.method):
            right = _right(model, processor, samples)
        print(f"{row.method:<12} {row.kept:>6.0f} {row.kl:>10.4f} {right:>6}")


def _right(model, processor, samples) -> int:
    given = evaluate.answer(model, processor, samples)
    return sum(sample.answer == answer for sample, answer in zip(samples, given, strict=True))


if __name__ == "__main__":
    main()
