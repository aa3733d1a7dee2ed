# SPDX-License-Identifier: Apache-2.0
"""Trains the built-in Qwen2.5-VL on one CPU thread: `python -m tools.refvlm.qwen2_5_vl.train --out FOLDER`.

Four phases, because a small model trained on questions alone stays at chance for very long:

1. *Look.* The vision side learns to label every visual token. The loss compares the projected token with the decoder's
   word vectors, so that a token of a red star is roughly "red" + "star" + "top" + "left", and answering reduces to
   finding the tokens that match some words.
2. *Answer.* A six-layer decoder, initialized from the earlier model, learns the new kinds of questions. The vision side
   is updated in every third step only, which saves a third of the time.
3. *Grow.* The decoder gets its full depth, initially without changing its function, and training continues.
4. *Find.* "Which line says X?" and "does the page say X?" stay at chance on pages of many lines, and are learned within
   hundreds of batches of pages of two lines. For 420 steps one batch of each step is short pages, which grow and begin
   again; the other batch, half as large, is of every kind, so that nothing is forgotten.

The learning rate is constant after a short warm-up and decays to zero in the last `--cooldown` steps. An interrupted
run resumes from `checkpoint.safetensors`; a finished run can be extended from `stable.safetensors`, the state before
the decay, with a larger `--steps`. `curve.json` holds the held-out accuracy of every kind over time.

The shipped weights are a tenth of those of step 2,720 and nine tenths of those of step 3,440 (`tools.refvlm.average`).
`--start vtprune/refvlm/weights_qwen2_5_vl --at 3440 --steps N` goes on from them. `curve.json` beside this file is that
of steps 2,720 to 3,440.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration

from vtprune import refvlm
from vtprune.refvlm.qwen import PictureProcessor

from .. import checkpoint
from ..learner import muon_and_adamw, score
from . import build, data
from .learner import BLIND_SHARE, Learner

CHECKPOINT = "checkpoint.safetensors"
FIND, GROWS = 420, 75  # steps of phase 4 with short pages, and after how many of them the pages grow
HELD_OUT = (
    ("scene", (6, 6), 24), ("scene", (12, 12), 24), ("scene", (24, 24), 6), ("scene", (36, 36), 2),
    ("crowd", (16, 16), 16), ("crowd", (36, 36), 4), ("page", (12, 12), 24), ("page", (20, 20), 8),
    ("page", (36, 36), 4), ("page", (4, 10), 24), ("pair", (8, 8), 24), ("clip", (6, 6), 24), ("clip", (9, 9), 8),
)  # fmt: skip


@torch.no_grad()
def validate(learner: Learner, batches: list[data.Batch], answers: bool, half: bool) -> dict[str, Any]:
    """Held-out accuracy by bed and size and by kind of question, and hit rates of visual tokens."""
    by_bed, by_kind, hits = Counter(), Counter(), {}
    for batch in batches:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            seen, _, found = learner.look(batch)
            tally = score(batch, learner.answer(batch, seen)[1]) if answers else Counter()
        bed = f"{batch.kind} {batch.grids[0][1]}x{batch.grids[0][2]}"
        for (kind, what), number in tally.items():
            by_bed[bed, what] += number
            by_kind[f"{batch.kind}: {kind}", what] += number
        for group, value in found.items():
            hits.setdefault(f"{batch.kind} {group}", []).append(value)

    def rates(tally: Counter) -> dict[str, float]:
        return {
            name: round(tally[name, "right"] / number, 4)
            for (name, what), number in sorted(tally.items())
            if what == "asked"
        }

    means = {name: round(sum(values) / len(values), 3) for name, values in sorted(hits.items())}
    return {"beds": rates(by_bed), "kinds": rates(by_kind), "visual tokens": means}


def orthogonalized(grad: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """The Newton-Schulz iteration of `torch.optim.Muon` in float32; torch's runs in bfloat16."""
    a, b, c = coefficients
    wide = grad.shape[0] <= grad.shape[1]
    out = grad if wide else grad.T
    out = out / out.norm().clamp_min(eps)
    for _ in range(steps):
        square = out @ out.T
        out = a * out + (b * square + c * square @ square) @ out
    return out if wide else out.T


def optimizers(learner: Learner, looking: bool) -> list[torch.optim.Optimizer]:
    """The optimizers of a phase; the vision side and the word vectors learn slowly once there are questions."""

    def scale(name: str) -> float:
        return 0.1 if "embed_tokens" in name else 0.4 if not looking and ".visual." in name else 1.0

    return muon_and_adamw(learner, scale)


def rate(step: int, start: int, args: argparse.Namespace, looking: bool) -> float:
    """Learning rate: warm-up after every change of phase, then constant, then linear decay to zero."""
    end, fall = (args.look, args.look // 3) if looking else (args.steps, args.cooldown)
    peak = args.look_lr if looking else args.lr
    return peak * min(1.0, (step - start + 1) / 60, max(0.02, (end - step) / max(1, fall)))


def write(path: Path, content: Any) -> None:
    """Writes JSON atomically."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps(content, indent=1) + "\n")
    new.replace(path)


def save_weights(learner: Learner, folder: Path) -> None:
    """Saves the model in float16 and its processor for `from_pretrained`."""
    learner.vlm.config.text_config._attn_implementation = "sdpa"
    learner.vlm.save_pretrained(folder, state_dict={k: v.half() for k, v in learner.vlm.state_dict().items()})
    learner.vlm.model.language_model.set_attn_implementation("refvlm_training")
    build.processor().save_pretrained(folder)
    os.chmod(folder / "model.safetensors", 0o644)


def begin(folder: Path) -> Any:
    """The model before the first step, initialized from the earlier six-layer model in `folder`."""
    seed = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype="float32")
    processor = PictureProcessor.from_pretrained(folder)
    drawn = [refvlm.scenes.scene(number) for number in range(refvlm.scenes.TRAIN_SEEDS, refvlm.scenes.TRAIN_SEEDS + 24)]
    asked = [(scene.image, refvlm.prompt(question.text)) for scene in drawn for question in scene.questions[:2]]
    return build.from_seed(seed, build.importance(seed, asked, processor))


def restore(file: Path, args: argparse.Namespace) -> tuple[Learner, list[torch.optim.Optimizer], int]:
    state, states, step = checkpoint.load(file, torch.device("cpu"))
    layers = 1 + max(int(name.split(".layers.")[1].split(".")[0]) for name in state if ".layers." in name)
    learner = Learner(build.build(layers))
    learner.load_state_dict(state)
    optims = optimizers(learner, step < args.look)
    same = all(
        len(optim.state_dict()["param_groups"]) == len(known["param_groups"])
        for optim, known in zip(optims, states, strict=True)
    )
    if same and step not in (args.look, args.look + args.small):  # a new phase starts with new optimizer states
        for optim, known in zip(optims, states, strict=True):
            optim.load_state_dict(known)
    return learner, optims, step


class Run:
    """A run of the training in the folder `args.out`, from its start or from where it stopped.

    Attributes:
        step: Steps done.
        phase_start: Step at which the learning rate last began to warm up.
        curve: Held-out accuracy over time, as in `curve.json`.
        spent: Seconds of the run's earlier parts.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.newest, self.stable, self.curve_file = (
            args.out / name for name in (CHECKPOINT, "stable.safetensors", "curve.json")
        )
        if args.fresh:
            for file in (self.newest, self.stable, self.curve_file):
                file.unlink(missing_ok=True)
        self.curve = json.loads(self.curve_file.read_text()) if self.curve_file.exists() else []
        self.spent = self.curve[-1]["minutes"] * 60 if self.curve else 0.0
        resumes = self.newest.exists()
        self.learner, self.optims, self.step = self._resume() if resumes else self._start()
        edge = self.step in (args.look, args.look + args.small)
        self.phase_start = max(0, self.step - 60) if resumes and not edge else self.step
        self.source, self.held_out = data.Source(), [data.held_out(*what) for what in HELD_OUT]
        self.losses: list[float] = []
        self.rights: Counter = Counter()
        self.began = self.saved = time.time()

    def _resume(self) -> tuple[Learner, list[torch.optim.Optimizer], int]:
        found = restore(self.newest, self.args)
        if self.stable.exists() and self.args.steps - found[2] > self.args.cooldown:  # extends a finished run
            found = restore(self.stable, self.args)
            self.stable.unlink()
        return found

    def _start(self) -> tuple[Learner, list[torch.optim.Optimizer], int]:
        args = self.args
        if args.start is None:
            learner = Learner(begin(args.earlier))
            return learner, optimizers(learner, True), 0
        learner = Learner(Qwen2_5_VLForConditionalGeneration.from_pretrained(args.start, dtype="float32"))
        deep = len(learner.vlm.model.language_model.layers) == build.LAYERS
        step = args.at if args.at is not None else args.find if deep else args.look
        return learner, optimizers(learner, False), step

    def train(self) -> None:
        """Trains to the last step."""
        while self.step < self.args.steps:
            self._enter_phase()
            self._one_step()
            self.step += 1
            if self.step % 50 == 0:
                self._print_losses()
            at_edge = self.step in (self.args.look, self.args.steps, self.args.steps - self.args.cooldown)
            if at_edge or time.time() - self.saved > 60 * self.args.minutes:
                self._validate_and_save()
                self.saved = time.time()

    def _enter_phase(self) -> None:
        """New optimizers where a phase begins, and the full depth where phase 3 does."""
        look, grow = self.args.look, self.args.look + self.args.small
        grows = self.step == grow and len(self.learner.vlm.model.language_model.layers) < build.LAYERS
        if grows:
            self.learner = Learner(build.grown(self.learner.vlm))
        if grows or self.step == look and self.phase_start != look:
            self.optims, self.phase_start = optimizers(self.learner, False), self.step

    def _one_step(self) -> None:
        looking = self.step < self.args.look
        for optim in self.optims:
            for group in optim.param_groups:
                group["lr"] = rate(self.step, self.phase_start, self.args, looking) * group["scale"]
        for part in range(self.args.parts):
            batch = self._batch(part, looking)
            with torch.autocast("cpu", torch.bfloat16, enabled=not self.args.float32):
                loss = self._loss(batch, looking)
            (loss / self.args.parts).backward()
        nn.utils.clip_grad_norm_(self.learner.parameters(), 1.0)
        for optim in self.optims:
            optim.step()
            optim.zero_grad()

    def _batch(self, part: int, looking: bool) -> data.Batch:
        budget = self.args.look_budget if looking else self.args.budget
        found = self.step - self.args.find  # steps of phase 4
        if part == 0 and 0 <= found < FIND:
            return self.source.short_pages(self.step, budget, found // GROWS % len(data.SHORT))
        size = budget // 2 if 0 <= found < FIND else budget
        return self.source.batch(self.step, part, size, 0.25, text=not looking, find=found >= 0)

    def _loss(self, batch: data.Batch, looking: bool) -> Tensor:
        if looking:
            loss = self.learner.look(batch)[1]
            self.losses.append(loss.item())
            return loss
        moving = self.step % 3 == 0
        if moving:
            seen, loss, _ = self.learner.look(batch)
        else:
            with torch.no_grad():
                seen = self.learner.see(batch)
        answers, predicted = self.learner.answer(batch, seen, BLIND_SHARE)
        self.rights += score(batch, predicted)
        self.losses.append(answers.item())
        return answers + 0.3 * loss if moving else answers

    def _minutes(self) -> float:
        return (self.spent + time.time() - self.began) / 60

    def _print_losses(self) -> None:
        asked, right = (
            sum(number for (_, what), number in self.rights.items() if what == name) for name in ("asked", "right")
        )
        loss, share = sum(self.losses) / len(self.losses), right / max(1, asked)
        print(f"{self._minutes():6.1f} min  step {self.step} loss {loss:.4f} right {share:.3f}", flush=True)
        self.losses.clear()
        self.rights.clear()

    def _validate_and_save(self) -> None:
        found = validate(self.learner, self.held_out, True, not self.args.float32)
        self.curve.append({"step": self.step, "minutes": round(self._minutes(), 1), **found})
        write(self.curve_file, self.curve)
        shown = found["beds"] or found["visual tokens"]
        print(f"{self.curve[-1]['minutes']:6.1f} min  step {self.step} held out {shown}", flush=True)
        checkpoint.save(self.newest, self.learner, self.optims, self.step)
        if self.step == self.args.steps - self.args.cooldown:
            checkpoint.save(self.stable, self.learner, self.optims, self.step)
        if self.step > self.args.look:
            save_weights(self.learner, self.args.out / "weights")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/qwen2_5_vl"))
    parser.add_argument("--look", type=int, default=900, help="steps of phase 1")
    parser.add_argument("--small", type=int, default=1400, help="steps of phase 2")
    parser.add_argument("--steps", type=int, default=3440, help="all steps")
    parser.add_argument("--find", type=int, default=2720, help="step at which phase 4 begins")
    parser.add_argument("--cooldown", type=int, default=290, help="last steps, in which the learning rate decays")
    parser.add_argument("--look-lr", type=float, default=1.2e-3)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--budget", type=int, default=2800, help="tokens per batch")
    parser.add_argument("--parts", type=int, default=2, help="batches per step")
    parser.add_argument("--look-budget", type=int, default=2200)
    parser.add_argument("--minutes", type=float, default=5.0, help="between checkpoints")
    parser.add_argument(
        "--earlier", type=Path, help="weights written by python -m tools.refvlm.train --model qwen2_5_vl"
    )
    parser.add_argument("--start", type=Path, help="folder of weights to start from")
    parser.add_argument("--at", type=int, help="step of these weights; by default phase 2 begins, or 4 at full depth")
    parser.add_argument("--float32", action="store_true", help="no bfloat16: five times faster where a CPU lacks it")
    parser.add_argument("--fresh", action="store_true", help="start again; by default an interrupted run resumes")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.float32:
        torch.optim._muon._zeropower_via_newtonschulz = orthogonalized  # it has no parameter for the dtype
    args.out.mkdir(parents=True, exist_ok=True)
    if args.start is None and args.earlier is None and (args.fresh or not (args.out / CHECKPOINT).exists()):
        parser.error("a run without --start needs the earlier model: --earlier FOLDER")
    Run(args).train()


if __name__ == "__main__":
    main()
