# SPDX-License-Identifier: Apache-2.0
"""Trains a reference model: `python -m tools.refvlm.train`, then perhaps `... --model qwen2_5_vl`.

Two phases, because a small model that is only asked questions stays at guessing for a very long time:

1. *Look.* The vision tower and the projector learn to say, patch by patch, which object is there. The loss compares
   the projected patch with the decoder's own word vectors, so that a patch of a red star arrives in the decoder as,
   roughly, "red" + "star" + "big" + "top" + "left", and answering becomes finding the patch that matches some words.
2. *Answer.* The decoder is trained on questions, about eleven packed behind one picture with a block mask. The same
   loss is also taken after the fourth decoder layer, which makes the decoder look at the picture early. The vision side
   rests, which saves a quarter of the time (`--joint` lets it move in the last steps).

Visual tokens are never dropped in training: this is an ordinary model, on which training-free pruning is tested.

The first model starts from nothing. The second one (`qwen2_5_vl`) starts from the decoder of the first, so that its new
vision side learns to speak to a decoder that knows the words already, and phase 2 is shorter.

Weights so far and a checkpoint are written to `--out` every `--every` steps: an interrupted run goes on from there, and
a run of other settings or versions is overwritten with `--force` only. Nothing is written into the package.
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

import torch
from torch import nn

from tools.refvlm import checkpoint, data
from tools.refvlm.learner import BLIND_SHARE, Learner, score
from vtprune.refvlm import MODELS, load, model, scenes
from vtprune.study import progress

RUN, CHECKPOINT = "run.json", "checkpoint.safetensors"
# What a run may not change when it goes on: the data drawn, and how fast is learned.
SETTINGS = (
    "model", "seed", "look", "answer", "joint", "batch", "lr", "patch_weight", "captions", "pool", "fresh", "workers",
    "average", "bf16",
)  # fmt: skip


def validation(count: int) -> list[data.Batch]:
    """Packed questions on `count` scenes that neither training nor the final evaluation draws."""
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
    """Muon for the matrices inside the layers, AdamW for word vectors, norms, biases and the patch embedding.

    Every group has a `scale` for the learning rate. In phase 2 what phase 1 has taught must not be lost while the
    decoder is still wild: the vision side and the word vectors that its patches point to move slowly.
    """
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, weight in learner.named_parameters():
        scale = 1.0
        if "embed_tokens" in name:
            scale = 0.1
        elif not looking and ("language_model" not in name):
            scale = 0.2
        inside = ".layers." in name or ".blocks." in name
        groups.setdefault((weight.ndim == 2 and inside, scale), []).append(weight)
    matrices, others = (
        [{"params": weights, "scale": scale} for (inside, scale), weights in groups.items() if inside is wanted]
        for wanted in (True, False)
    )
    return [
        torch.optim.Muon(matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def rate(step: int, start: int, end: int, warm: int = 100) -> float:
    """Share of the learning rate: a short warm-up, then a cosine down to 2 %."""
    done = (step - start) / max(1, end - start)
    return min(1.0, (step - start + 1) / warm) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


def share(tensors: list[torch.Tensor], workers: int) -> None:
    """Averages tensors over all workers, in place and in one message."""
    if workers == 1:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    torch.distributed.all_reduce(flat)
    flat /= workers
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def save_weights(learner: Learner, folder: Path) -> None:
    """The model in float16, with tokenizer and processor, as `from_pretrained` wants them."""
    vlm = copy.deepcopy(learner.vlm)
    for module in vlm.modules():
        vars(module).pop("forward", None)  # what only training has
    vlm.to("cpu", torch.float16).save_pretrained(folder)
    learner.processor().save_pretrained(folder)
    os.chmod(folder / "model.safetensors", 0o644)


def learner_class(name: str) -> type[Learner]:
    """What trains the model `name`."""
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


def work(worker: int, args: argparse.Namespace) -> None:
    """One of `args.workers` processes."""
    device = torch.device(args.device)
    if device.type == "cpu":
        torch.set_num_threads(args.threads)
    if args.workers > 1:
        store = f"file://{args.out.resolve()}/rendezvous"
        torch.distributed.init_process_group("gloo", init_method=store, rank=worker, world_size=args.workers)
    learner = untrained(args.model, args.seed)
    torch.manual_seed(args.seed)
    learner.heads.apply(lambda part: part.reset_parameters() if hasattr(part, "reset_parameters") else None)
    learner.to(device)
    file, step = args.out / CHECKPOINT, 0
    if file.exists():
        state, states, step = checkpoint.load(file, device)
        learner.load_state_dict(state)
    optims = optimizers(learner, step < args.look)
    if step not in (0, args.look):  # each phase starts with fresh optimizers
        for optim, known in zip(optims, states, strict=True):
            optim.load_state_dict(known)
    total = args.look + args.answer
    began = time.time()
    pool = data.Pool(args.seed, worker, args.workers, args.pool, args.fresh, step)
    held_out = validation(args.validate) if worker == 0 else []
    log = (args.out / "log.txt").open("a") if worker == 0 else None

    def say(text: str) -> None:
        if log:
            print(f"{time.time() - began:6.0f} s  {text}", file=log, flush=True)
            print(f"{time.time() - began:6.0f} s  {text}", flush=True)

    weights = sum(weight.numel() for weight in learner.vlm.parameters())
    say(f"{weights:,} weights, pool of {args.pool * args.workers} scenes drawn")
    losses: list[float] = []
    with progress.bar("steps", total, step) if worker == 0 else nullcontext(lambda now: None) as tick:
        while step < total:
            looking = step < args.look
            if step == args.look:
                optims = optimizers(learner, looking)
            factor = rate(step, 0, args.look) if looking else rate(step, args.look, total)
            for optim in optims:
                for group in optim.param_groups:
                    group["lr"] = args.lr * factor * group["scale"]
            captions = args.captions if step < args.look + args.answer // 2 else args.captions / 3
            pictures = args.batch // args.workers * (2 if looking else 1)
            batch = pool.batch(step, pictures, pictures // 8, captions, learner.SIZES).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
                with torch.set_grad_enabled(looking or step >= total - args.joint):
                    patches, loss, hits = learner.look(batch)
                if not looking:
                    answers, predicted = learner.answer(batch, patches, BLIND_SHARE)
                    loss = answers + args.patch_weight * loss
                    losses.append(answers.item())
                else:
                    losses.append(loss.item())
            loss.backward()
            if looking:
                share([weight.grad for weight in learner.parameters() if weight.grad is not None], args.workers)
            nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
            for optim in optims:
                optim.step()
                optim.zero_grad()
            step += 1
            tick("look" if looking else "answer")
            if not looking and (step % args.average == 0 or step % args.every == 0 or step == total):
                # Workers that wait for each other at every step lose half their time on a busy machine.
                share([weight.data for weight in learner.parameters()], args.workers)
            if step % 25 == 0:
                tally = Counter() if looking else score(batch, predicted)
                right = sum(number for (_, what), number in tally.items() if what == "right")
                tail = "" if looking else f" right {right / sum(map(len, batch.asked)):.3f}"
                shown = " ".join(f"{group[:5]} {value:.2f}" for group, value in hits.items())
                say(f"step {step}/{total} loss {sum(losses) / len(losses):.4f}{tail} | {shown}")
                losses.clear()
            if step % args.every == 0 or step == total or step == args.look:
                if worker == 0:
                    say(f"step {step} " + validate(learner, held_out, device))
                    checkpoint.save(file, learner, optims, step)
                    save_weights(learner, args.out / "weights")
                if args.workers > 1:
                    torch.distributed.barrier()
    if worker == 0:
        say(f"weights written to {args.out / 'weights'}")


def begin(args: argparse.Namespace) -> None:
    """Makes the folder of a run, or finds it as an interrupted run of the same settings left it.

    Raises:
        StaleResultError: It holds a run of other settings or versions.
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
    parser.add_argument("--out", type=Path, help="log, checkpoint and weights so far (out/MODEL)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--look", type=int, help="steps of phase 1 (700; qwen2_5_vl: 600)")
    parser.add_argument("--answer", type=int, help="steps of phase 2 (1200; qwen2_5_vl: 400)")
    parser.add_argument("--joint", type=int, default=0, help="last steps, in which the vision side moves too")
    parser.add_argument("--batch", type=int, default=32, help="pictures a step, all workers (phase 1: twice)")
    parser.add_argument("--lr", type=float, help="learning rate (2e-3; qwen2_5_vl: 1.5e-3)")
    parser.add_argument("--patch-weight", type=float, default=0.3, help="of the patch loss in phase 2")
    parser.add_argument("--captions", type=float, default=0.3, help="share of scenes that are also described")
    parser.add_argument("--pool", type=int, default=3000, help="scenes in memory, per worker")
    parser.add_argument("--fresh", type=int, default=4, help="new scenes a step, per worker")
    parser.add_argument("--validate", type=int, default=192, help="held-out scenes for the log")
    parser.add_argument("--every", type=int, default=150, help="steps between checkpoints")
    parser.add_argument("--workers", type=int, default=2, help="processes that share every batch")
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
        else:  # daemons: none of them trains on when this process is interrupted
            processes = torch.multiprocessing.start_processes
            processes(work, (args,), nprocs=args.workers, start_method="spawn", daemon=True)


if __name__ == "__main__":
    main()
