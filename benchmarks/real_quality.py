# SPDX-License-Identifier: Apache-2.0
"""Right answers of the model of real parts, with and without pruning: writes `benchmarks/results/real-quality.json`.

    make real
    .venv-real/bin/python -m benchmarks.real_quality                   # the unpruned model, then every method
    .venv-real/bin/python -m benchmarks.real_quality --methods iwp --beds "scene 16"

`benchmarks.real.picture_vlm` (a DINOv2 tower, SmolLM2, our projector and LoRA) is asked about objects drawn on parts of
photographs that its training never saw, and about pages of large text, at 256 to 1,024 visual tokens. Answers are
generated greedily and must be equal word for word. Every method gets the same mean cost, the share of visual tokens
averaged over the inputs of the decoder layers. A bed is a kind of picture and its patches in each direction; questions
are asked eight at a time for all methods in turn, so that an interrupted run has as many of every row, and goes on from
there.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

import vtprune
from benchmarks import command
from benchmarks.real import drawn, parts, picture_vlm
from vtprune.bench.variants import method_of
from vtprune.refvlm import beds
from vtprune.refvlm.evaluate import Sample, tally
from vtprune.study import progress

OUT = Path(__file__).resolve().parent / "results" / "real-quality.json"
BEDS = {"scene": (16, 24, 32), "crowd": (16, 24), "page": (16, 24)}
PRUNED = ("scene 16",)  # where every method is tried
MEAN_RATIOS = (0.3, 0.15)
BATCH = 8


def bed_names() -> list[str]:
    """Names of all beds, such as "scene 24"."""
    return [f"{kind} {grid}" for kind, grids in BEDS.items() for grid in grids]


@lru_cache(maxsize=1)
def model() -> Any:
    """The model in bfloat16, as it would be served."""
    return picture_vlm.load(dtype=torch.bfloat16)[0]


@lru_cache(maxsize=4)
def samples(bed: str, count: int) -> tuple[Sample, ...]:
    """The first questions of a bed, about the same number of each kind."""
    kind, grid = bed.split()
    pictures = (drawn.picture(kind, seed, int(grid)) for seed in range(count))
    return tuple(Sample(one.image, q.text, q.answer, q.kind, q.patches) for one, q in beds.evenly(pictures))


@torch.no_grad()
def answers(bed: str, asked: tuple[Sample, ...]) -> list[str]:
    """Greedy answers to questions about pictures of one size."""
    prepare = picture_vlm.processor(int(bed.split()[1]))
    texts = [picture_vlm.prompt(one.question) for one in asked]
    inputs = prepare(images=[one.image for one in asked], text=texts, return_tensors="pt", padding=True)
    inputs["pixel_values"] = inputs["pixel_values"].to(model().dtype)
    given = model().generate(**inputs)[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in prepare.batch_decode(given, skip_special_tokens=True)]


def run(bed: str, row: dict[str, Any], count: int, start: int) -> dict[str, Any]:
    """Answers of one row to a batch of questions, with its mean cost, or the reason why the method refuses."""
    asked = samples(bed, count)[start : start + BATCH]
    if "method" not in row:
        return {"answers": answers(bed, asked), "cost": 1.0}
    try:
        with vtprune.patch(model(), method=method_of(row["method"]), mean_ratio=row["mean_ratio"]) as patch:
            return {"answers": answers(bed, asked), "cost": round(patch.last.mean_ratio, 4)}
    except (vtprune.BudgetError, vtprune.MethodError) as error:
        return {"refused": str(error)}


def key(row: dict[str, Any]) -> str:
    """Name of a row in the result."""
    return f"{row['method']} {row['mean_ratio']}" if "method" in row else "unpruned"


def measure(names: list[str], methods: list[str], count: int, pruned: int, out: Path, force: bool) -> dict[str, Any]:
    """Asks what `out` does not hold yet.

    Args:
        names, methods: beds, and methods on those of `PRUNED`.
        count, pruned: questions of the unpruned model on each bed, and of every method.
    """
    header = {
        "projector_and_lora_sha256": hashlib.sha256(picture_vlm.WEIGHTS.read_bytes()).hexdigest(),
        "decoder_sha256": parts.SHA256[parts.GGUF],
        "tower_sha256": parts.SHA256[parts.ONNX],
        "held_out_photographs": list(drawn.HELD_OUT),
        "questions": count,
        "versions": progress.versions(),
    }
    data: dict[str, Any] = header | progress.load(out, header, force)
    found = data.setdefault("beds", {})
    cut = [{"method": name, "mean_ratio": share} for share in MEAN_RATIOS for name in methods]
    jobs: list[tuple[str, int, dict[str, Any]]] = [
        (bed, start, {}) for start in range(0, count, BATCH) for bed in names
    ]
    jobs += [
        (bed, at, row) for bed in names if bed in PRUNED for at in range(0, min(count, pruned), BATCH) for row in cut
    ]

    def open_job(job: tuple[str, int, dict[str, Any]]) -> bool:
        bed, start, row = job
        old = found.get(bed, {}).get(key(row), {})
        return "refused" not in old and len(old.get("outcomes", "")) <= start

    def one(job: tuple[str, int, dict[str, Any]]) -> dict[str, Any]:
        return run(job[0], job[2], count, job[1]) if open_job(job) else {}

    work = progress.work(
        [job for job in jobs if open_job(job)], one, "questions", name=lambda job: f"{job[0]} {key(job[2])}"
    )
    for (bed, start, row), result in work:
        kept = found.setdefault(bed, {}).setdefault(key(row), dict(row))
        if "refused" in result:
            kept["refused"] = result["refused"]
        elif result:
            asked = samples(bed, count)[: start + len(result["answers"])]
            right = [one.answer == text for one, text in zip(asked[start:], result["answers"], strict=True)]
            kept["outcomes"] = kept.get("outcomes", "") + "".join(map(str, map(int, right)))
            # What was answered does not matter any more; a wrong answer is any other text.
            texts = [one.answer if bit == "1" else "" for one, bit in zip(asked, kept["outcomes"], strict=True)]
            kept |= {"cost": result["cost"], "kinds": tally(asked, texts)}
        progress.save(out, data)
    return data


def main(argv: list[str] | None = None) -> None:
    parser = command.parser(__doc__, OUT)
    parser.add_argument("--beds", nargs="+", default=bed_names(), choices=bed_names(), metavar="BED")
    parser.add_argument(
        "--methods",
        nargs="*",
        metavar="NAME[:OPTION=VALUE]",
        default=command.METHODS,
    )
    parser.add_argument("--questions", type=int, default=48, help="of the unpruned model on each bed")
    parser.add_argument("--pruned", type=int, default=32, help="of every method")
    args = parser.parse_args(argv)
    with progress.script(args.out):
        data = measure(args.beds, args.methods, args.questions, args.pruned, args.out, args.force)
    for bed, rows in data["beds"].items():
        for name, row in rows.items():
            if "refused" in row:
                print(f"{bed:9} {name:22} refused: {row['refused'][:80]}")
                continue
            whole = row["kinds"]["all"]
            low, high = whole["interval"]
            each = "  ".join(f"{kind} {one['accuracy']:.2f}" for kind, one in row["kinds"].items() if kind != "all")
            print(f"{bed:9} {name:22} {whole['right']:3}/{whole['total']:3} {low:.2f} to {high:.2f}  {each}")


if __name__ == "__main__":
    main()
