# SPDX-License-Identifier: Apache-2.0
"""Trains the built-in LLaVA or, with `--model qwen2_5_vl`, the earlier Qwen2.5-VL: `python -m tools.refvlm.train`.

Two phases, because a small model trained on questions alone stays at chance for very long:

1. *Look.* Vision tower and projector learn to label every patch with the object that it shows. The loss compares the
   projected patch with the decoder's word vectors, so that a patch of a red star is roughly "red" + "star" + "big" +
   "top" + "left", and answering reduces to finding the patch that matches some words.
2. *Answer.* The decoder is trained on questions, about eleven packed after one picture with a block mask. The same loss
   after the fourth decoder layer makes the decoder attend to the picture early. The vision side is frozen, which saves
   a quarter of the time (`--joint` trains it in the last steps).

No visual token is dropped in training: these are ordinary models for tests of training-free pruning. The LLaVA starts
from random weights; `qwen2_5_vl` starts from its decoder, which makes phase 2 shorter.

Weights and a checkpoint are written to `--out` every `--every` steps, and an interrupted run resumes from there. A run
of other settings or versions is overwritten only with `--force`. Nothing is written into the package.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import random
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tools.refvlm import checkpoint, data, model
from tools.refvlm.learner import BLIND_SHARE, Learner, muon_and_adamw, score
from vtprune.refvlm import MODELS, load, scenes
from vtprune.study import progress

RUN, CHECKPOINT = "run.json", "checkpoint.safetensors"
# Settings that a resumed run may not change: data and learning rates.
SETTINGS = (
    "model", "seed", "look", "answer", "joint", "batch", "lr", "patch_weight", "captions", "pool", "fresh", "workers",
    "average", "bf16",
)  # fmt: skip


def validation(count: int) -> list[data.Batch]:
    """Packed questions about `count` scenes that neither training nor the final evaluation uses."""
    rng = random.Random(0)
    rows = []
    for seed in range(900_000, 900_000 + count):
        drawn = scenes.scene(seed)
        rows.append((data.small(drawn.image), drawn.objects, data.ask_many(drawn.objects, rng)))
    return [data.pack(rows[start : start + 32]) for start in range(0, count, 32)]


@torch.no_grad()
def validate(learner: Learner, batches: list[data.Batch], device: torch.device) -> str:
    tally: Counter = Counter()
    hits: dict[str, list[float]] = {}
    for batch in batches:
        batch = batch.to(device)
        patches, _, seen = learner.look(batch)
        tally += score(batch, learner.answer(batch, patches)[1])
        for group, value in seen.items():
            hits.setdefault(group, []).append(value)
    asked = {kind: number for (kind, what), number in sorted(tally.items()) if what == "asked"}
    rates = {kind: tally[kind, "right"] / number for kind, number in asked.items()}
    total = sum(tally[kind, "right"] for kind in asked) / sum(asked.values())
    shown = " ".join(f"{group[:5]} {sum(v) / len(v):.2f}" for group, v in hits.items())
    return f"held-out {total:.3f} | " + " ".join(f"{k} {v:.2f}" for k, v in rates.items()) + f" | patches {shown}"


def optimizers(learner: Learner, looking: bool) -> list[torch.optim.Optimizer]:
    """The optimizers of a phase.

    In phase 2 the learning rate is small for the vision side and the word vectors, so that the untrained decoder does
    not destroy the result of phase 1.
    """

    def scale(name: str) -> float:
        return 0.1 if "embed_tokens" in name else 0.2 if not looking and "language_model" not in name else 1.0

    return muon_and_adamw(learner, scale)


def rate(step: int, start: int, end: int, warm: int = 100) -> float:
    """Learning rate factor: a short warm-up, then cosine decay to 2 %."""
    done = (step - start) / max(1, end - start)
    return min(1.0, (step - start + 1) / warm) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


def share(tensors: list[torch.Tensor], workers: int) -> None:
    """Averages tensors over all workers, in place, in one all-reduce."""
    if workers == 1:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    torch.distributed.all_reduce(flat)
    flat /= workers
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def save_weights(learner: Learner, folder: Path) -> None:
    """Saves the model in float16 with tokenizer and processor for `from_pretrained`."""
    vlm = copy.deepcopy(learner.vlm)
    for module in vlm.modules():
        vars(module).pop("forward", None)  # replaced for training only
    vlm.to("cpu", torch.float16).save_pretrained(folder)
    learner.processor().save_pretrained(folder)
    os.chmod(folder / "model.safetensors", 0o644)


def learner_class(name: str) -> type[Learner]:
    """The learner class of the model `name`."""
    if name == "llava":
        return Learner
    from tools.refvlm.qwen_learner import QwenLearner

    return QwenLearner


def untrained(name: str, seed: int) -> Learner:
    """The learner of the model `name` before its first step."""
    if name == "llava":
        return Learner(model.build(seed))
    from . import qwen

    return learner_class(name)(qwen.build(seed, model.VOCABULARY, load()[0]))


class Worker:
    """One of `args.workers` processes that train a model together.

    Attributes:
        number: Which one; 0 validates, prints and saves.
        step: Steps done.
    """

    def __init__(self, number: int, args: argparse.Namespace) -> None:
        self.number, self.args, self.device = number, args, torch.device(args.device)
        self.began, self.total = time.time(), args.look + args.answer
        self.file, self.step = args.out / CHECKPOINT, 0
        self.learner = untrained(args.model, args.seed)
        torch.manual_seed(args.seed)
        self.learner.heads.apply(lambda part: part.reset_parameters() if hasattr(part, "reset_parameters") else None)
        self.learner.to(self.device)
        states: list[dict[str, Any]] = []
        if self.file.exists():
            state, states, self.step = checkpoint.load(self.file, self.device)
            self.learner.load_state_dict(state)
        self.optims = optimizers(self.learner, self.step < args.look)
        if self.step not in (0, args.look):  # each phase starts with new optimizers
            for optim, known in zip(self.optims, states, strict=True):
                optim.load_state_dict(known)
        self.pool = data.Pool(args.seed, number, args.workers, args.pool, args.fresh, self.step)
        self.held_out = validation(args.validate) if number == 0 else []
        self.losses: list[float] = []

    def train(self) -> None:
        """Trains to the last step."""
        weights = sum(weight.numel() for weight in self.learner.vlm.parameters())
        self._say(f"{weights:,} weights, pool of {self.args.pool * self.args.workers} scenes drawn")
        shown = progress.bar("steps", self.total, self.step) if self.number == 0 else nullcontext(lambda now: None)
        with shown as tick:
            while self.step < self.total:
                looking = self.step < self.args.look
                found = self._one_step(looking)
                self.step += 1
                tick("look" if looking else "answer")
                if not looking and (self.step % self.args.average == 0 or self._saves()):
                    # Synchronizing every step would halve the speed on a busy machine.
                    share([weight.data for weight in self.learner.parameters()], self.args.workers)
                if self.step % 25 == 0:
                    self._say_losses(*found)
                if self._saves() or self.step == self.args.look:
                    self._save()
        self._say(f"weights written to {self.args.out / 'weights'}")

    def _one_step(self, looking: bool) -> tuple[Counter, dict[str, float]]:
        """One update; returns the score of its questions and the hit rates of its patches."""
        args, step = self.args, self.step
        if step == args.look:
            self.optims = optimizers(self.learner, looking)
        factor = rate(step, 0, args.look) if looking else rate(step, args.look, self.total)
        for optim in self.optims:
            for group in optim.param_groups:
                group["lr"] = args.lr * factor * group["scale"]
        batch, tally = self._batch(looking), Counter[tuple[str, str]]()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=args.bf16):
            with torch.set_grad_enabled(looking or step >= self.total - args.joint):
                patches, loss, hits = self.learner.look(batch)
            of_task = loss
            if not looking:
                of_task, predicted = self.learner.answer(batch, patches, BLIND_SHARE)
                loss = of_task + args.patch_weight * loss
        self.losses.append(of_task.item())
        loss.backward()
        if looking:
            share([weight.grad for weight in self.learner.parameters() if weight.grad is not None], args.workers)
        elif (step + 1) % 25 == 0:
            tally = score(batch, predicted)
        nn.utils.clip_grad_norm_(self.learner.parameters(), 1.0)
        for optim in self.optims:
            optim.step()
            optim.zero_grad()
        return tally, hits

    def _batch(self, looking: bool) -> data.Batch:
        args = self.args
        captions = args.captions if self.step < args.look + args.answer // 2 else args.captions / 3
        pictures = args.batch // args.workers * (2 if looking else 1)
        return self.pool.batch(self.step, pictures, pictures // 8, captions, self.learner.SIZES).to(self.device)

    def _saves(self) -> bool:
        return self.step % self.args.every == 0 or self.step == self.total

    def _save(self) -> None:
        if self.number == 0:
            self._say(f"step {self.step} " + validate(self.learner, self.held_out, self.device))
            checkpoint.save(self.file, self.learner, self.optims, self.step)
            save_weights(self.learner, self.args.out / "weights")
        if self.args.workers > 1:
            torch.distributed.barrier()

    def _say_losses(self, tally: Counter, hits: dict[str, float]) -> None:
        asked, right = (
            sum(number for (_, what), number in tally.items() if what == name) for name in ("asked", "right")
        )
        tail = f" right {right / asked:.3f}" if asked else ""
        shown = " ".join(f"{group[:5]} {value:.2f}" for group, value in hits.items())
        self._say(f"step {self.step}/{self.total} loss {sum(self.losses) / len(self.losses):.4f}{tail} | {shown}")
        self.losses.clear()

    def _say(self, text: str) -> None:
        if self.number == 0:
            line = f"{time.time() - self.began:6.0f} s  {text}"
            with (self.args.out / "log.txt").open("a") as log:
                print(line, file=log)
            print(line, flush=True)


def work(number: int, args: argparse.Namespace) -> None:
    """Trains in worker `number`, a process of its own if there are several."""
    if torch.device(args.device).type == "cpu":
        torch.set_num_threads(args.threads)
    if args.workers > 1:
        store = f"file://{args.out.resolve()}/rendezvous"
        torch.distributed.init_process_group("gloo", init_method=store, rank=number, world_size=args.workers)
    Worker(number, args).train()


def begin(args: argparse.Namespace) -> None:
    """Creates the folder of a run, or accepts that of an interrupted run with the same settings.

    Raises:
        StaleResultError: The folder holds a run of other settings or versions.
    """
    file, checkpoint_file = args.out / RUN, args.out / CHECKPOINT
    header = {"settings": {name: getattr(args, name) for name in SETTINGS}, "versions": progress.versions()}
    if args.force or not file.exists() and not checkpoint_file.exists():
        checkpoint_file.unlink(missing_ok=True)
        progress.save(file, header)
    elif not file.exists():
        raise progress.StaleResultError(
            f"{checkpoint_file} is of an unknown run; use another folder, or --force to overwrite it"
        )
    progress.load(file, header)
    (args.out / "rendezvous").unlink(missing_ok=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.refvlm.train", description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=list(MODELS), default="llava")
    parser.add_argument("--out", type=Path, help="folder of log, checkpoint and weights (out/MODEL)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--look", type=int, help="steps of phase 1 (700; qwen2_5_vl: 600)")
    parser.add_argument("--answer", type=int, help="steps of phase 2 (1200; qwen2_5_vl: 400)")
    parser.add_argument("--joint", type=int, default=0, help="last steps, in which the vision side is trained too")
    parser.add_argument("--batch", type=int, default=32, help="pictures per step over all workers (phase 1: twice)")
    parser.add_argument("--lr", type=float, help="learning rate (2e-3; qwen2_5_vl: 1.5e-3)")
    parser.add_argument("--patch-weight", type=float, default=0.3, help="weight of the patch loss in phase 2")
    parser.add_argument("--captions", type=float, default=0.3, help="share of scenes with a caption")
    parser.add_argument("--pool", type=int, default=3000, help="scenes in memory, per worker")
    parser.add_argument("--fresh", type=int, default=4, help="new scenes per step and worker")
    parser.add_argument("--validate", type=int, default=192, help="held-out scenes for the log")
    parser.add_argument("--every", type=int, default=150, help="steps between checkpoints")
    parser.add_argument("--workers", type=int, default=2, help="processes that divide every batch")
    parser.add_argument("--average", type=int, default=8, help="phase 2: steps after which workers average weights")
    parser.add_argument("--threads", type=int, default=1, help="per process")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (then use --workers 1)")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="autocast")
    parser.add_argument("--force", action="store_true", help="overwrite an existing run")
    args = parser.parse_args(argv)
    args.out = args.out or Path("out") / args.model
    usual = learner_class(args.model)
    for name, value in (("look", usual.LOOK), ("answer", usual.ANSWER), ("lr", usual.RATE)):
        if getattr(args, name) is None:
            setattr(args, name, value)
    with progress.script(args.out / CHECKPOINT):
        begin(args)
        if args.workers == 1:
            work(0, args)
        else:  # daemons, so that they end if this process is interrupted
            processes = torch.multiprocessing.start_processes
            processes(work, (args,), nprocs=args.workers, start_method="spawn", daemon=True)


if __name__ == "__main__":
    main()
