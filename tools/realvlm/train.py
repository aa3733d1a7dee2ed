# SPDX-License-Identifier: Apache-2.0
"""Trains projector and LoRA of the model of real parts: `python -m tools.realvlm.train --out FOLDER`.

    make real
    .venv-real/bin/python -m tools.realvlm.train --out out/realvlm --steps 4000

The projector is trained first, alone: every patch becomes the vectors of the words that describe it, so that the
decoder, which knows the words already, reads the picture as words. Then projector and LoRA learn from descriptions and
questions, about thirteen behind each picture: scenes first, then all kinds of pictures, drawn anew in every step. Tower
and decoder stay as they are.

The learning rate is constant until the last fifth of `--steps`. A run goes on from its last checkpoint, also with more
steps than before; the curve in `curve.json` is on held-out photographs. `weights.safetensors` is what
`benchmarks/real/weights` takes; those there are from `--steps 3600 --scenes 900 --any-size 1800`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from pathlib import Path

import torch

from tools.refvlm import checkpoint
from tools.refvlm.learner import score
from vtprune.study import progress

from . import data
from .learner import Learner

HELD_OUT = (("scene", 16, 10), ("crowd", 16, 4), ("page", 16, 6))  # kind, grid, pictures
COOLDOWN = 0.2  # of the steps
WARM = 40


def rate(step: int, steps: int) -> float:
    """Share of the learning rate."""
    return min(1.0, (step + 1) / WARM, max(0.02, (steps - step) / (COOLDOWN * steps)))


def optimizer(learner: Learner, lr: float) -> torch.optim.Optimizer:
    groups = [
        {"params": list(learner.projector.parameters()), "scale": 0.3},
        {"params": list(learner.lora), "scale": 1.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)


def train_step(learner: Learner, optim: torch.optim.Optimizer, step: int, args: argparse.Namespace) -> float:
    """One step, which follows from its number and the state; returns the loss."""
    captions = 0.5 if step < args.captions else 0.15
    loss, _ = learner(data.batch(args.seed, step, args.budget, captions, step < args.scenes, step >= args.any_size))
    optim.zero_grad()
    learner.backward(loss)
    torch.nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
    for group in optim.param_groups:
        group["lr"] = args.lr * group["scale"] * rate(step, args.steps)
    optim.step()
    return loss.item()


@torch.no_grad()
def validate(learner: Learner, batches: dict[str, data.Batch]) -> dict[str, float]:
    """Share of right answers by kind of question, and over all questions about each kind of picture."""
    shares: dict[str, float] = {}
    for name, batch in batches.items():
        tally: Counter = score(batch, learner(batch)[1])
        kinds = sorted({kind for kind, _ in tally})
        asked, right = (sum(tally[kind, what] for kind in kinds) for what in ("asked", "right"))
        shares[name] = round(right / asked, 3)
        shares |= {f"{name}: {kind}": round(tally[kind, "right"] / tally[kind, "asked"], 2) for kind in kinds}
    return shares


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    learner, file = Learner(), args.out / "checkpoint.safetensors"
    optim, step = optimizer(learner, args.lr), 0
    curve_file = args.out / "curve.json"
    curve = json.loads(curve_file.read_text(encoding="utf-8"))["curve"] if curve_file.exists() else []
    if file.exists():
        state, states, step = checkpoint.load(file, torch.device("cpu"))
        learner.load_state_dict(state)
        optim.load_state_dict(states[0])
        curve = [point for point in curve if point["step"] <= step]
    else:
        print(f"patches show {learner.begin(args.look)}", flush=True)
    batches = {f"{kind} {grid}": data.held_out(kind, grid, count) for kind, grid, count in HELD_OUT}
    losses: list[float] = []
    while step < args.steps:
        losses.append(train_step(learner, optim, step, args))
        step += 1
        if step % args.every == 0 or step == args.steps:
            mean = round(sum(losses) / len(losses), 4)
            losses = []
            cpu = round(time.process_time())
            curve.append({"step": step, "loss": mean, "processor_seconds": cpu} | validate(learner, batches))
            print(json.dumps(curve[-1]), flush=True)
            checkpoint.save(file, learner, [optim], step)
            learner.save(args.out / "weights.safetensors")
            progress.save(curve_file, {"curve": curve})
        elif step % 20 == 0:
            print(f"{step} loss {sum(losses[-20:]) / 20:.3f} {time.process_time():.0f} s", flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.realvlm.train", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/realvlm"), help="checkpoint, curve and weights so far")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=1e-3, help="of LoRA; the projector's is a third of it")
    parser.add_argument("--budget", type=int, default=640, help="tokens a step")
    parser.add_argument("--captions", type=int, default=200, help="first steps, in which most scenes are described")
    parser.add_argument("--scenes", type=int, default=1000, help="first steps, in which there are only scenes")
    parser.add_argument("--any-size", type=int, default=10**9, help="from this step on, all sizes are equally frequent")
    parser.add_argument("--look", type=float, default=1.5, help="thousands of pictures that the projector sees first")
    parser.add_argument("--every", type=int, default=100, help="steps between checkpoints")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    run(args)


if __name__ == "__main__":
    main()
