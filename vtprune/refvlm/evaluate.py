# SPDX-License-Identifier: Apache-2.0
"""Accuracy of the built-in models: `python -m vtprune.refvlm.evaluate --easy-vqa`.

Every answer is generated greedily with `model.generate` from the processor's inputs, and is right only if it equals the
reference word for word. The functions are reused by `benchmarks/` for pruned models.

Answers are saved batch by batch: an interrupted evaluation resumes where it stopped. Only `--force` overwrites a result
of another model or version.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from ..errors import InputError
from ..study import progress
from ..study.intervals import wilson
from . import MODELS, beds, easy_vqa, load, prompt, scenes, weights_sha256


class Sample(NamedTuple):
    """A picture, a question and its answer; `patches` (row-major in the 12 x 12 grid) is empty where unknown."""

    image: Image.Image
    question: str
    answer: str
    kind: str
    patches: tuple[int, ...] = ()


def held_out_scenes(n_scenes: int, questions_per_scene: int = 1) -> Iterator[Sample]:
    """Questions on small scenes that training never draws, about the same number of each kind (not all have all)."""
    if n_scenes > scenes.TRAIN_SEEDS:
        raise InputError(f"found n_scenes={n_scenes:,}; expected at most the {scenes.TRAIN_SEEDS:,} held-out scenes")
    for drawn, question in beds.evenly(map(scenes.scene, range(n_scenes)), questions_per_scene):
        yield Sample(drawn.small, question.text, question.answer, question.kind, question.patches)


def easy_vqa_test(limit: int | None = None) -> Iterator[Sample]:
    """The questions of the easy-VQA test split, the first `limit` of them or all 9,673."""
    for index, (image, sample) in enumerate(easy_vqa.load("test")):
        if limit is not None and index >= limit:
            return
        yield Sample(image, sample.question, sample.answer, sample.kind)


@torch.no_grad()
def answer(model: Any, processor: Any, samples: Iterable[Any], batch_size: int = 32) -> list[str]:
    """Greedy answers, one per sample, in order.

    Args:
        model: a model with `generate`, patched or not.
        processor: its processor.
        samples: anything with `image` and `question`; read lazily, one batch at a time.
        batch_size: prompts per `generate` call, padded on the left.
    """
    answers: list[str] = []
    for batch in _batches(samples, batch_size):
        inputs = processor(
            images=[sample.image for sample in batch],
            text=[prompt(sample.question) for sample in batch],
            return_tensors="pt",
            padding=True,
        ).to(model.device)
        generated = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        tail = generated[:, inputs["input_ids"].shape[1] :]
        answers += [text.strip() for text in processor.batch_decode(tail, skip_special_tokens=True)]
    return answers


@torch.no_grad()
def answer_alone(model: Any, processor: Any, sample: beds.Sample) -> str:
    """The greedy answer to a question about pictures of any number and size, or a clip."""
    inputs = processor(**sample.inputs(), return_tensors="pt").to(model.device)
    generated = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    return str(processor.decode(generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


def tally(samples: Sequence[Any], answers: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Exact-match accuracy over everything (`all`) and by kind, with that of a constant answer.

    `majority` of a kind is the share of its most frequent answer; that of `all` is the best guess made kind by kind.
    """
    rows: dict[str, dict[str, Any]] = {}
    guessed = 0
    for kind in sorted({sample.kind for sample in samples}):
        mine = [(sample.answer, given) for sample, given in zip(samples, answers, strict=True) if sample.kind == kind]
        most = Counter(want for want, _ in mine).most_common(1)[0][1]
        guessed += most
        rows[kind] = _row(sum(want == given for want, given in mine), len(mine), most)
    right = sum(sample.answer == given for sample, given in zip(samples, answers, strict=True))
    return {"all": _row(right, len(samples), guessed), **rows}


def _row(right: int, total: int, majority: int) -> dict[str, Any]:
    interval = [round(bound, 4) for bound in wilson(right, total)]
    share = majority / max(1, total)
    return {
        "right": right,
        "total": total,
        "accuracy": round(right / max(1, total), 4),
        "interval": interval,
        "majority": round(share, 4),
    }


def _batches(samples: Iterable[Any], size: int) -> Iterator[list[Any]]:
    batch: list[Any] = []
    for sample in samples:
        batch.append(sample)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def header(name: str, model: Any, processor: Any, n_scenes: int, questions: int) -> dict[str, Any]:
    """Conditions under which results are comparable."""
    return {
        "model": name,
        "weights_sha256": weights_sha256(name),
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "image_processor": type(processor.image_processor).__name__,
        "asked": {"scenes": n_scenes, "questions_per_scene": questions},
        "versions": progress.versions(),
    }


def _schema(sets: Mapping[str, Sequence[Sample]]) -> dict[str, Any]:
    """JSON Schema of a result file, beside its header."""
    share, number = {"type": "number", "minimum": 0, "maximum": 1}, {"type": "integer", "minimum": 0, "maximum": 10**9}
    interval = {"type": "array", "items": share, "minItems": 2, "maxItems": 2}
    row = {"right": number, "total": number, "accuracy": share, "interval": interval, "majority": share}
    rows = {"type": "object", "required": [*row], "properties": row}
    tallied = {"type": "object", "required": ["all"], "additionalProperties": rows}
    given = {
        kind: {"type": "array", "items": {"type": "string"}, "maxItems": len(samples)} for kind, samples in sets.items()
    }
    drawn = {"type": "object", "additionalProperties": tallied}
    return {
        "properties": {
            **dict.fromkeys(sets, tallied),
            "answers": {"type": "object", "properties": given},
            "beds": drawn,
        }
    }


def measure(
    name: str,
    n_scenes: int,
    questions: int,
    easy: bool,
    batch: int,
    out: Path | None,
    force: bool = False,
    in_beds: int = 0,
) -> dict[str, Any]:
    """Asks all questions that are missing in `out`, which is written after every batch.

    Args:
        name: Which of the reference models.
        n_scenes, questions: Held-out scenes, and questions on each; no scenes for 0.
        easy: Also the easy-VQA test split.
        batch: Prompts at a time.
        out: The result file, or None.
        force: Ignore the existing file.
        in_beds: Questions in each of `beds`, 0 for none.

    Returns:
        dict: Content of the file.

    Raises:
        StaleResultError: `out` holds results of another model, other weights, versions or scenes.
    """
    model, processor = load(name=name)
    data: dict[str, Any] = header(name, model, processor, n_scenes, questions)
    sets = {"scenes": list(held_out_scenes(n_scenes, questions))} if n_scenes else {}
    if easy:
        sets["easy_vqa_test"] = list(easy_vqa_test())
    data |= progress.load(out, data, force, _schema(sets))
    for kind, samples in sets.items():
        if kind in data:
            continue
        given: list[str] = data.setdefault("answers", {}).setdefault(kind, [])
        parts = [samples[start : start + batch] for start in range(len(given), len(samples), batch)]

        def one(part: list[Sample]) -> list[str]:
            return answer(model, processor, part, batch)

        before = -(-len(given) // batch)
        for _, answers in progress.work(parts, one, f"batches of {kind}", done=before, name=lambda part: part[0].kind):
            given += answers
            progress.save(out, data)
        data[kind] = tally(samples, given)
        del data["answers"][kind]
    data.pop("answers", None)
    for bed in beds.names() if in_beds else ():
        asked = beds.samples(bed, in_beds)
        if data.get("beds", {}).get(bed, {}).get("all", {}).get("total") != len(asked):
            given = [answer_alone(model, processor, sample) for sample in asked]
            data.setdefault("beds", {})[bed] = tally(asked, given)
            progress.save(out, data)
    progress.save(out, data)
    return data


def _show(data: dict[str, Any]) -> None:
    sets = {name: data[name] for name in ("scenes", "easy_vqa_test") if name in data}
    for name, kinds in (sets | data.get("beds", {})).items():
        for kind, row in kinds.items():
            low, high = row["interval"]
            share = f"{row['right']:5}/{row['total']:<5} {row['accuracy']:7.2%}"
            tail = f"95 % interval {low:.1%} to {high:.1%}  majority guess {row['majority']:.1%}"
            print(f"{name:14} {kind:13} {share}  {tail}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m vtprune.refvlm.evaluate", description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=list(MODELS), default="llava")
    parser.add_argument("--scenes", type=int, default=1000, help="held-out scenes (0: none)")
    parser.add_argument("--questions", type=int, default=1, help="per scene")
    parser.add_argument("--easy-vqa", action="store_true", help="also the easy-VQA test split")
    parser.add_argument("--beds", type=int, default=0, help="questions on each kind and size of drawn pictures")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    parser.add_argument("--force", action="store_true", help="overwrite existing results")
    args = parser.parse_args(argv)
    if args.beds and args.model != "qwen2_5_vl":
        parser.error(f"--beds asks about pages, pairs and clips, which {args.model} does not know; use qwen2_5_vl")
    with progress.script(args.out):
        data = measure(
            args.model, args.scenes, args.questions, args.easy_vqa, args.batch, args.out, args.force, args.beds
        )
    _show(data)
    if args.out:
        print(f"written to {args.out}")


if __name__ == "__main__":
    main()
