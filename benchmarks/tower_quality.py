# SPDX-License-Identifier: Apache-2.0
"""Quality of cuts inside the vision tower, compared with resizing: writes `benchmarks/results/tower_quality.json`.

    python -m benchmarks.tower_quality [--prompts 16]
    python -m benchmarks.tower_quality --prompts 48 --methods Change Similar --keeps 0.5 0.35 --out FILE

Prompts are questions to the built-in Qwen2.5-VL about held-out scenes at several resolutions and about drawn pages of
text. Every tower method runs at several shares, alone and with the decoder's default method at a tenth of the tokens.
Rows hold agreement of the next token with the unpruned model, KL divergence from it, right first answer tokens, and
operations to the first token (vision tower and text included) relative to the unpruned ones (the tower of this model is
small relative to its decoder). `resize` uses smaller pictures; each row is compared with the largest picture that needs
no more operations. `rescued`: of the questions that the unpruned model answers rightly but not from that picture, the
share that the row answers rightly. `kl_above_change` compares each method with `Change` (IPCV) on the same prompts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

import vtprune
from benchmarks import command
from benchmarks.accuracy import header
from vtprune import refvlm, towers
from vtprune.refvlm import evaluate, pages
from vtprune.study import intervals, metrics
from vtprune.study.resize import regained, resized, rival

OUT = Path(__file__).resolve().parent / "results" / "tower_quality.json"
PARTS = ("scenes 144", "scenes 216", "pages 144", "pages 240")  # pixels along a side; a token is 12 x 12
KEEPS = (0.75, 0.5, 0.35)
METHODS: dict[str, Callable[[float], towers.TowerMethod]] = {
    "Change": lambda keep: towers.Change(keep=keep),
    "Attention": lambda keep: towers.Attention(keep=keep),
    "Similar": lambda keep: towers.Similar(keep=keep),
    "Pixels": lambda keep: towers.Pixels(keep=keep),
    "Random": lambda keep: towers.Random(keep=keep),
    "Uniform": lambda keep: towers.Uniform(keep=keep),
}
DECODERS = (1.0, 0.1)
SMALLER = (0.9, 0.75, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)  # shares of the visual tokens of resized pictures


def prompts(part: str, count: int) -> list[tuple[Image.Image, str, str]]:
    """Picture, question and answer."""
    kind, side = part.split()
    if kind == "scenes":
        found = evaluate.held_out_scenes(count)
        return [(sample.image.resize((int(side), int(side))), sample.question, sample.answer) for sample in found]
    grid = (int(side) // pages.CELL,) * 2
    out = []
    for seed in range(count):
        page = pages.page(seed, grid)
        question = page.questions[seed % len(page.questions)]
        out.append((page.image, question.text, question.answer))
    return out


def variants(methods: Sequence[str], keeps: Sequence[float]) -> dict[str, dict[str, Any]]:
    """Name of each row to the arguments of `patch`."""
    found: dict[str, dict[str, Any]] = {"unpruned": {"ratio": 1.0}, "decoder 0.1": {"ratio": 0.1}}
    for name in methods:
        for keep in keeps:
            for ratio in DECODERS:
                label = f"{name} {keep}" + (f", decoder {ratio}" if ratio < 1 else "")
                found[label] = {"ratio": ratio, "tower": METHODS[name](keep)}
    return found


def asked(model: Any, inputs: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Next-token logits, and the operations and the processor time to the first token, vision tower included."""
    with vtprune.patch(model, **options) as patch:
        start = time.process_time()
        logits = metrics.next_token_logits(model, inputs)
        seconds = time.process_time() - start
        last = patch.last
    assert last is not None and last.tower is not None
    return {"logits": logits, "flops": last.tower.first_token[1], "tokens": last.tokens[1], "seconds": seconds}


def one_part(
    model: Any, processor: Any, part: str, count: int, everything: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """All rows of one part."""
    rows: dict[str, list[dict[str, Any]]] = {}
    top = processor.image_processor.size["longest_edge"]
    processor.image_processor.size["longest_edge"] = int(part.split()[1]) ** 2
    for image, question, answer in prompts(part, count):

        def prompt(picture: Image.Image, question: str = question) -> Any:
            return processor(images=[picture], text=[refvlm.prompt(question)], return_tensors="pt")

        def tokens_of(made: Any) -> int:
            return int(made["mm_token_type_ids"].sum())

        whole = prompt(image)
        word = processor.tokenizer(answer, add_special_tokens=False)["input_ids"][0]
        turn = {name: asked(model, whole, options) for name, options in everything.items()}
        for share in SMALLER:
            made, _ = resized(processor, image, prompt, tokens_of, int(share * tokens_of(whole)))
            turn[f"resize {share}"] = asked(model, made, {"ratio": 1.0})
        base = turn["unpruned"]
        for name, row in turn.items():
            rows.setdefault(name, []).append(
                {
                    "kl": float(metrics.divergence(base["logits"], row["logits"])[0]),
                    "same": bool(base["logits"].argmax() == row["logits"].argmax()),
                    "right": int(row["logits"].argmax()) == word,
                    "cost": row["flops"] / base["flops"],
                    "time": row["seconds"] / base["seconds"],
                    "tokens": row["tokens"],
                }
            )
    processor.image_processor.size["longest_edge"] = top
    return {"prompts": count, "rows": [summary(name, rows) for name in rows]}


def summary(name: str, rows: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Means of a row, and those of resizing at no more operations on the same prompts."""
    mine = rows[name]
    cost = statistics.mean(row["cost"] for row in mine)
    found = {
        "row": name,
        "cost": cost,
        "time": statistics.median(row["time"] for row in mine),
        "tokens": statistics.mean(row["tokens"] for row in mine),
        "kl": statistics.mean(row["kl"] for row in mine),
        "kl_interval": list(intervals.bootstrap([row["kl"] for row in mine])),
        "same": sum(row["same"] for row in mine),
        "right": sum(row["right"] for row in mine),
    }
    published = f"Change{name[len(name.split()[0]) :]}"
    if name.split()[0] in METHODS and published in rows and published != name:
        against = [a["kl"] - b["kl"] for a, b in zip(mine, rows[published], strict=True)]
        found["kl_above_change"] = list(intervals.bootstrap(against))
    smaller = {n: statistics.mean(r["cost"] for r in rows[n]) for n in rows if n.startswith("resize")}
    other = rival(cost, smaller)
    if other is None or name == "unpruned" or name.startswith("resize"):
        return found
    lost, rescued = regained(*([row["right"] for row in rows[n]] for n in ("unpruned", other, name)))
    difference = [a["kl"] - b["kl"] for a, b in zip(mine, rows[other], strict=True)]
    return found | {
        "resize": other,
        "resize_cost": smaller[other],
        "resize_kl": statistics.mean(row["kl"] for row in rows[other]),
        "resize_same": sum(row["same"] for row in rows[other]),
        "resize_right": sum(row["right"] for row in rows[other]),
        "kl_above_resize": list(intervals.bootstrap(difference)),
        "lost": lost,
        "rescued": rescued,
    }


def main() -> None:
    parser = command.parser(__doc__, OUT)
    parser.add_argument("--prompts", type=int, default=16, help="prompts of each part (default: %(default)s)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--keeps", nargs="+", type=float, default=KEEPS)
    args = parser.parse_args()
    model, processor = refvlm.load(name="qwen2_5_vl")
    everything = variants(args.methods, args.keeps)
    head = header(args.prompts, "qwen2_5_vl") | {"variants": list(everything)}
    command.fill(
        args, head, "parts", args.parts, lambda part: one_part(model, processor, part, args.prompts, everything)
    )


if __name__ == "__main__":
    main()
