# SPDX-License-Identifier: Apache-2.0
"""Right answers on drawn pages and crowds with pruning and on smaller pictures: writes `benchmarks/results/drawn.json`.

    python -m benchmarks.drawn [--questions 40] [--beds "pages 20 x 20"] [--force]

The built-in Qwen2.5-VL answers one question at a time. Every method keeps as many visual tokens as the smaller picture
of the row `resize` has after the processor's rounding. `lost` counts the questions answered rightly from the full
picture and wrongly from the smaller one, and `rescued` those of them that the method answers rightly.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import vtprune
from benchmarks import command
from benchmarks.accuracy import header, wilson_of
from vtprune import refvlm
from vtprune.refvlm import beds
from vtprune.study import progress
from vtprune.study.resize import shrinking

OUT = Path(__file__).resolve().parent / "results" / "drawn.json"
BEDS = ("pages 20 x 20", "crowds 24 x 24")
METHODS = ("resprune", "divprune", "scope", "iwp", "pyramiddrop", "dart", "pixels", "random", "uniform")
RATIOS = (0.5, 0.25, 0.1)


def answered(model: Any, processor: Any, inputs: dict[str, Any], sample: beds.Sample) -> bool:
    tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return str(processor.decode(tokens, skip_special_tokens=True)).strip() == sample.answer


@torch.no_grad()
def ask(model: Any, processor: Any, sample: beds.Sample) -> dict[str, Any]:
    """For each row, whether its answer is right, its visual tokens and its operations (unpruned = 1)."""

    def made(picture: Any) -> Any:
        return processor(**sample._replace(pictures=[picture]).inputs(), return_tensors="pt")

    def row(inputs: Any, **options: Any) -> dict[str, Any]:
        with vtprune.patch(model, **options) as patch:
            right = answered(model, processor, inputs, sample)
            last = patch.last
            return {"right": right, "tokens": int(last.tokens[1]), "cost": last.tower.first_token[1]}

    picture = sample.pictures[0]
    inputs, smaller = made(picture), shrinking(model, processor, picture, made)
    rows = {"unpruned": row(inputs, ratio=1.0, method="uniform")}
    total = rows["unpruned"]["tokens"]
    for ratio in RATIOS:
        small, count = smaller(int(ratio * total))
        rows[f"resize {ratio}"] = row(small, ratio=1.0, method="uniform")
        for method in METHODS:
            rows[f"{method} {ratio}"] = row(inputs, keep=count, method=method)
    whole = rows["unpruned"]["cost"]
    return {name: one | {"cost": one["cost"] / whole} for name, one in rows.items()}


def summary(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per method and ratio, over all questions."""
    rows = []
    for name in records[0]:
        mine = [record[name] for record in records]
        right = sum(one["right"] for one in mine)
        row: dict[str, Any] = {
            "row": name,
            "tokens": sum(one["tokens"] for one in mine) / len(mine),
            "cost": round(sum(one["cost"] for one in mine) / len(mine), 4),
            "right": right,
            "total": len(mine),
            "answers": "".join(str(int(one["right"])) for one in mine),
        } | wilson_of(right, len(mine))
        beside = f"resize {name.split()[-1]}"
        if name != beside and beside in records[0]:
            lost = [r for r in records if r["unpruned"]["right"] and not r[beside]["right"]]
            row |= {"lost": len(lost), "rescued": sum(r[name]["right"] for r in lost)}
        rows.append(row)
    return rows


def main() -> None:
    parser = command.parser(__doc__, OUT)
    parser.add_argument("--questions", type=int, default=40, help="questions of each bed (default: %(default)s)")
    parser.add_argument("--beds", nargs="+", default=list(BEDS), choices=beds.names(), metavar="BED")
    args = parser.parse_args()
    model, processor = refvlm.load(name="qwen2_5_vl")
    with progress.script(args.out):
        data: dict[str, Any] = header(args.questions, "qwen2_5_vl")
        data["questions"] = f"{args.questions} questions about held-out pictures of each kind"
        data |= {"beds": progress.load(args.out, data, args.force).get("beds", {})}
        for bed in [bed for bed in args.beds if bed not in data["beds"]]:
            asked = beds.samples(bed, args.questions)
            work = progress.work(asked, lambda sample: ask(model, processor, sample), bed, name=lambda s: s.kind)
            data["beds"][bed] = summary([record for _, record in work])
            progress.save(args.out, data)
    for bed, rows in data["beds"].items():
        for row in rows:
            print(f"{bed:<16} {row['row']:<18} {row['right']:3}/{row['total']} cost {row['cost']:.2f}")


if __name__ == "__main__":
    main()
