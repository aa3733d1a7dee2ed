# SPDX-License-Identifier: Apache-2.0
"""A pruning strategy searched on your own pictures; no labels are needed.

    python examples/06_tune_on_own_images.py                                     # on scenes that the package draws
    python examples/06_tune_on_own_images.py --images FOLDER --trials 30 --model FOLDER_OR_HUB_NAME

Needs optuna and scipy: `pip install ".[tune]"`. The command `vtprune tune` does the same.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import vtprune
from vtprune import refvlm
from vtprune.core import images
from vtprune.refvlm import loading
from vtprune.study.tune import tune


def main() -> None:
    parser = argparse.ArgumentParser(description="Searches a strategy of VFlowOpt on a folder of pictures.")
    parser.add_argument("--images", help="a folder of pictures (default: a few drawn scenes)")
    parser.add_argument("--question", default="what color is the sign?")
    parser.add_argument("--model", default=loading.EMBEDDED)
    parser.add_argument("--mean-ratio", type=float, default=0.2)
    parser.add_argument("--trials", type=int, default=4)
    parser.add_argument("--out", type=Path, help="a new file for the strategy (default: in a temporary folder)")
    args = parser.parse_args()
    args.out = args.out or Path(tempfile.mkdtemp()) / "strategy.json"

    pictures = images.pictures(args.images) if args.images else [refvlm.scenes.scene(n).image for n in range(4)]
    model, processor = loading.model_and_processor(args.model)
    prompts = [loading.prompt(processor, picture, args.question).to(model.device) for picture in pictures]

    def log(search) -> None:
        print(f"trial {len(search.trials)}: {search.trials[-1]['value'] / search.samples:.4f}", flush=True)

    search = tune(model, prompts, args.mean_ratio, trials=args.trials, path=args.out, log=log)
    first, best = (trial["value"] / search.samples for trial in (search.trials[0], search.best))
    print(f"cosine to the unpruned state: {first:.4f} as released, {best:.4f} with the best strategy found")

    strategy = vtprune.methods.VFlowOpt.load(args.out)  # in your service, later
    with vtprune.patch(model, mean_ratio=args.mean_ratio, method=strategy) as patch:
        model.generate(**prompts[0], max_new_tokens=4)
    print(f"{args.out}: mean ratio {patch.last.mean_ratio:.3f}, {patch.last.tokens[1]} tokens left at the end")


if __name__ == "__main__":
    main()
