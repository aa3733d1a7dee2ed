# SPDX-License-Identifier: Apache-2.0
"""Accuracy of the built-in model with every pruning method: writes `benchmarks/results/accuracy.json`.

    python -m benchmarks.accuracy                       # all methods, 1,000 questions, two processes
    python -m benchmarks.accuracy --questions 64 --methods iwp random --out /tmp/a.json

Questions are about held-out scenes; answers are generated greedily in padded batches and scored by exact match. Rows
are saved one by one, and an interrupted benchmark resumes. A result of other weights or versions is overwritten only
with `--force`.
`oracle` keeps the patches that contain the answer, then evenly spaced ones, as a reference for all methods.
`answer_patches` is the share of answer patches that survive the last cut.
`resize` is the unpruned model on smaller pictures; methods keep as many tokens as these have after the processor's
rounding (or the ratio, for a model with a fixed grid). `answers` has a 1 for every right answer, and `cost` is the
share of the unpruned operations up to the first token, vision tower included. `benchmarks.report` compares every row
with `resize` at equal tokens and at no more operations, and counts the right answers among the questions that resizing
loses (group A of VTC-Bench).
`python -m benchmarks.report` turns the result into the README's tables.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vtprune
from vtprune import refvlm
from vtprune.core.ragged import top_k
from vtprune.methods import Choice, Method, Tokens
from vtprune.methods.uniform import Uniform
from vtprune.refvlm import evaluate
from vtprune.study import progress
from vtprune.study.resize import MORE, NAME, shrinking

OUT = Path(__file__).resolve().parent / "results" / "accuracy.json"
RATIOS = (0.5, 0.25, 0.1, 0.05)
MEAN_RATIOS = (0.7, 0.6, 0.4)


@dataclass
class Oracle(Method):
    """Keeps the known answer patches, then evenly spaced ones.

    Attributes:
        layer: The cut is before this decoder layer.
        patches: Indices of the answer patches of each sample; set before every call.
    """

    layer: int = 0
    patches: list[tuple[int, ...]] = field(default_factory=list)

    def choose(self, tokens: Tokens) -> Choice:
        wanted = torch.zeros(len(tokens))
        for sample, patches in enumerate(self.patches):
            mine = (tokens.sample == sample).nonzero()[:, 0]
            wanted[mine[list(patches)]] = 1.0
        spaced = Uniform().choose(tokens).keep.float()
        return Choice(top_k(2 * wanted + spaced, tokens.offsets, tokens.budgets))


@lru_cache(maxsize=1)
def prepared(
    questions: int, batch: int, embedded: str = "llava"
) -> tuple[Any, Any, list[tuple[list[evaluate.Sample], Any]]]:
    """Model, processor, and batches with their processed inputs, cached per process."""
    torch.set_num_threads(1)
    model, processor = refvlm.load(name=embedded)
    samples = list(itertools.islice(evaluate.held_out_scenes(questions), questions))
    batches = []
    for start in range(0, len(samples), batch):
        part = samples[start : start + batch]
        text = [refvlm.prompt(sample.question) for sample in part]
        images = [sample.image for sample in part]
        batches.append((part, processor(images=images, text=text, return_tensors="pt", padding=True)))
    return model, processor, batches


@torch.no_grad()
def run(
    name: str | None, budget: dict[str, float], questions: int, batch: int, embedded: str = "llava"
) -> dict[str, Any]:
    """Measures one row: a method at a budget, or the unpruned model.

    Args:
        name: Registered name, "oracle", "resize", or None for the unpruned model.
        budget: `ratio` or `mean_ratio`.
        questions, batch: Number of questions, and batch size.
        embedded: Name of the built-in model.

    Returns:
        dict: The row; `refused` is the reason if the method cannot meet the budget.
    """
    model, processor, batches = prepared(questions, batch, embedded)
    row: dict[str, Any] = {} if name is None else {"method": name, **budget}
    if name == NAME:
        return row | _resized(budget["ratio"], batches, model, processor)
    method: Any = Oracle() if name == "oracle" else name
    given: dict[str, Any] = dict(budget)
    if "ratio" in budget:
        with contextlib.suppress(vtprune.MethodError):
            sample = batches[0][0][0]
            given = {"keep": _smaller(budget["ratio"], sample, model, processor)[1]}
    try:
        patch = vtprune.patch(model, method=method, **given) if name is not None else None
    except (vtprune.BudgetError, vtprune.MethodError) as error:
        return row | {"refused": str(error)}
    right, held, kept, mean, cost = [], [], [], [], []
    for samples, inputs in batches:
        if name == "oracle":
            method.patches = [sample.patches for sample in samples]
        tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        answers = processor.batch_decode(tokens, skip_special_tokens=True)
        right += [sample.answer == given.strip() for sample, given in zip(samples, answers, strict=True)]
        if patch is None or patch.last is None:
            continue
        last = patch.last
        kept += [len(columns) for columns in last.kept]
        mean.append(last.mean_ratio)
        cost += [last.tower.first_token[1] / last.tower.first_token[0]] if last.tower else []
        held += list(_answer_share(samples, last))
    if patch is not None:
        patch.remove()
        row |= {
            "kept": sum(kept) / len(kept),
            "mean_tokens": refvlm.VISUAL_TOKENS * sum(mean) / len(mean),
            "answer_patches": round(sum(held) / len(held), 4),
            "cost": round(sum(cost) / len(cost), 4),
        }
    return row | _right(right)


def _right(right: list[bool]) -> dict[str, Any]:
    """The accuracy fields of a row."""
    answers = "".join(str(int(one)) for one in right)
    return {"right": sum(right), "total": len(right), "answers": answers} | wilson_of(sum(right), len(right))


def _smaller(ratio: float, sample: evaluate.Sample, model: Any, processor: Any) -> tuple[Any, int]:
    """Inputs of a question with a smaller picture, and their visual tokens."""

    def made(picture: Any) -> Any:
        return processor(images=[picture], text=[refvlm.prompt(sample.question)], return_tensors="pt")

    return shrinking(model, processor, sample.image, made)(max(1, int(ratio * refvlm.VISUAL_TOKENS)))


def _resized(ratio: float, batches: list[Any], model: Any, processor: Any) -> dict[str, Any]:
    """The row of smaller pictures, at batch size one."""
    right, kept, cost = [], [], []
    with vtprune.patch(model, ratio=1.0, method="uniform") as counting:
        for number, sample in enumerate(sample for samples, _ in batches for sample in samples):
            try:
                inputs, count = _smaller(ratio, sample, model, processor)
            except vtprune.MethodError as error:
                return {"refused": str(error)}
            tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, inputs["input_ids"].shape[1] :]
            right.append(processor.batch_decode(tokens, skip_special_tokens=True)[0].strip() == sample.answer)
            kept.append(count)
            cost.append(_operations(counting))
            if number == 0:
                model(**_smaller(1.0, sample, model, processor)[0])
                whole = _operations(counting)
    mean = sum(kept) / len(kept)
    share = round(sum(cost) / len(cost) / whole, 4)
    return {"kept": mean, "mean_tokens": mean, "cost": share} | _right(right)


def _operations(patch: vtprune.Patch) -> float:
    """Operations up to the first token of the last prefill, vision tower included."""
    assert patch.last is not None and patch.last.tower is not None
    return patch.last.tower.first_token[1]


def wilson_of(right: int, total: int) -> dict[str, list[float]]:
    """The 95 % interval field of a row."""
    return {"interval": [round(bound, 4) for bound in evaluate.wilson(right, total)]}


def _answer_share(samples: list[evaluate.Sample], last: vtprune.Pruning) -> Iterator[float]:
    for sample, visual, kept in zip(samples, last.visual, last.kept, strict=True):
        alive: Tensor = torch.isin(visual, kept)
        if sample.patches:
            yield float(alive[list(sample.patches)].float().mean())


def header(questions: int, embedded: str = "llava") -> dict[str, Any]:
    """Conditions that must be equal for results to be comparable."""
    return {
        "model": embedded,
        "questions": f"{questions:,} questions about held-out scenes",
        "weights_sha256": refvlm.weights_sha256(embedded),
        "versions": progress.versions(),
        "machine": f"{os.cpu_count()} {platform.machine()} cores, float32",
    }


def measure(
    jobs: list[tuple[str | None, dict[str, float]]],
    questions: int,
    batch: int = 32,
    processes: int = 1,
    out: Path | None = None,
    log: Any = lambda text: None,
    force: bool = False,
    embedded: str = "llava",
) -> dict[str, Any]:
    """Runs all jobs that are missing in `out`.

    Args:
        jobs: Method (None for unpruned) and budget of every row.
        questions, batch: As for `run`.
        processes: Number of concurrent jobs, each on one core.
        out: File to which rows are written one by one.
        log: Called with a line of text after every row.
        force: Overwrite `out`, even with rows of other weights or versions.
        embedded: Name of the built-in model.

    Returns:
        dict: Content of the file.

    Raises:
        StaleResultError: `out` holds rows of other weights or versions.
    """
    data: dict[str, Any] = header(questions, embedded)
    old = progress.load(out, data, force)
    data |= {"unpruned": old.get("unpruned"), "rows": old.get("rows", [])}
    done = {_key(row) for row in data["rows"]}
    todo = [job for job in jobs if (data["unpruned"] is None if job[0] is None else _key_of(*job) not in done)]

    def add(row: dict[str, Any]) -> None:
        if "method" in row:
            data["rows"] = sorted([*data["rows"], row], key=_key)
        else:
            data["unpruned"] = {"visual_tokens": refvlm.VISUAL_TOKENS} | row
        progress.save(out, data)
        log(json.dumps(row))

    one = partial(_job, questions=questions, batch=batch, embedded=embedded)
    for _, row in progress.work(todo, one, "methods", done=len(jobs) - len(todo), processes=processes, name=_name):
        add(row)
    return data


def _job(job: tuple[str | None, dict[str, float]], questions: int, batch: int, embedded: str) -> dict[str, Any]:
    return run(*job, questions, batch, embedded)


def _name(job: tuple[str | None, dict[str, float]]) -> str:
    return " ".join([job[0] or "unpruned", *(f"{key}={value:g}" for key, value in job[1].items())])


def _key(row: dict[str, Any]) -> tuple:
    return _key_of(row["method"], {name: row[name] for name in ("ratio", "mean_ratio") if name in row})


def _key_of(name: str | None, budget: dict[str, float]) -> tuple:
    return (name, *sorted(budget.items()))


def _print(text: str) -> None:
    print(text, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Accuracy of the built-in model with every pruning method.")
    parser.add_argument("--model", choices=list(refvlm.MODELS), default="llava", help="which built-in model")
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--methods", nargs="+", default=[*vtprune.methods.for_pictures(), "oracle"])
    parser.add_argument("--ratios", nargs="*", type=float, default=list(RATIOS))
    parser.add_argument("--mean-ratios", nargs="*", type=float, default=list(MEAN_RATIOS))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, help=f"default: {OUT.name}, or accuracy-MODEL.json beside it")
    parser.add_argument("--force", action="store_true", help="overwrite an existing result")
    args = parser.parse_args()
    args.out = args.out or (OUT if args.model == "llava" else OUT.with_stem(f"accuracy-{args.model}"))
    budgets = [{"ratio": r} for r in args.ratios] + [{"mean_ratio": r} for r in args.mean_ratios]
    shares = sorted({*args.ratios, *MORE}, reverse=True) if args.model != "llava" else []  # which has a fixed grid
    resized = [(NAME, {"ratio": ratio}) for ratio in shares]
    jobs = [(None, {}), *resized, *itertools.product(args.methods, budgets)]
    with progress.script(args.out):
        measure(jobs, args.questions, args.batch, args.processes, args.out, _print, args.force, args.model)
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
