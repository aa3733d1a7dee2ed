# SPDX-License-Identifier: Apache-2.0
"""The needle test on a real decoder: writes `benchmarks/results/needle.json`.

    make real
    .venv-real/bin/python -m benchmarks.needle                       # 256 places, then 1,024
    .venv-real/bin/python -m benchmarks.needle --places 256 --methods iwp random

A text at 256 or 1,024 visual positions contains one fact, at varying depth, and the question asks for it (see
`benchmarks.real`). Every method gets the same mean cost, the share of visual tokens averaged over the inputs of the 30
decoder layers. Two controls validate the test: the fact's tokens are always kept with evenly spaced others (nearly all
answers stay right), and only the fact's tokens are dropped (none does).

The tokens are text, not patches: a word cannot be inferred from its neighbors as a patch can, and the model was not
trained on text at visual positions. This penalizes cuts before the decoder or in its first layers. At 1,024 positions
the 40 filler sentences repeat, which favors methods that drop duplicates. Trials run in blocks of eight over all
methods, so that an interrupted run has equally many trials of every row, and resumes.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

import vtprune
from benchmarks import command
from benchmarks.real import needles, parts, text_vlm
from vtprune.bench.variants import method_of
from vtprune.core.ragged import top_k
from vtprune.methods import Choice, Method, Tokens
from vtprune.methods.uniform import Uniform
from vtprune.study import progress
from vtprune.study.intervals import wilson

OUT = Path(__file__).resolve().parent / "results" / "needle.json"
MEAN_RATIOS = (0.57, 0.3, 0.15)
PLACES = (256, 1024)
TRIALS = 200
BATCH = 8
CONTROL_RATIO = 0.1
KEPT, DROPPED = "fact always kept", "only the fact dropped"


@dataclass
class FactControl(Method):
    """A control method that knows the position of the fact.

    Attributes:
        layer: The cut is before this decoder layer.
        keep: Whether the fact's tokens are kept or dropped first.
        facts: Positions of each sample's fact; set before every call.
    """

    layer: int = 0
    keep: bool = True
    facts: list[tuple[int, ...]] = field(default_factory=list)

    def choose(self, tokens: Tokens) -> Choice:
        fact = torch.zeros(len(tokens))
        for sample, places in enumerate(self.facts):
            mine = (tokens.sample == sample).nonzero()[:, 0]
            fact[mine[list(places)]] = 1.0
        if not self.keep:
            return Choice(top_k(-fact, tokens.offsets, tokens.budgets))
        spaced = Uniform().choose(tokens).keep.float()
        return Choice(top_k(2 * fact + spaced, tokens.offsets, tokens.budgets))


@lru_cache(maxsize=1)
def model() -> Any:
    """The decoder in float32: CPUs that have no bfloat16 emulate it, many times slower."""
    return text_vlm.load(torch.float32)


@lru_cache(maxsize=4)
def trials(places: int, count: int, start: int, stop: int) -> tuple[list[needles.Needle], dict[str, torch.Tensor]]:
    """Trials `start` to `stop` of `count`, and their model inputs."""
    chosen = [needles.needle(number, count, places) for number in range(start, stop)]
    words, after = [one.words for one in chosen], [one.question for one in chosen]
    return chosen, text_vlm.inputs("<|im_start|>Text:", words, after)


@torch.no_grad()
def answers(chosen: list[needles.Needle], inputs: dict[str, torch.Tensor]) -> list[bool]:
    """Whether each greedy answer starts with the right one."""
    tokenizer = parts.tokenizer()
    longest = max(len(tokenizer(f" {one.answer}")["input_ids"]) for one in chosen)
    given = model().generate(**inputs, max_new_tokens=longest, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    texts = tokenizer.batch_decode(given[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip().startswith(one.answer) for text, one in zip(texts, chosen, strict=True)]


def run(name: str, budget: dict[str, float], places: int, count: int, start: int, stop: int) -> dict[str, Any]:
    """Outcomes of one row in trials `start` to `stop` as "0" and "1", or the reason of a refusal."""
    chosen, inputs = trials(places, count, start, stop)
    if name == "unpruned":
        return {"outcomes": "".join(map(str, map(int, answers(chosen, inputs))))}
    if name == DROPPED:  # facts differ in length, so budgets differ per trial
        found = ""
        for number, one in enumerate(chosen, start=start):
            control = FactControl(keep=False, facts=[one.fact])
            with vtprune.patch(model(), keep=places - len(one.fact), method=control):
                found += str(int(answers(*trials(places, count, number, number + 1))[0]))
        return {"outcomes": found}
    method = FactControl(facts=[one.fact for one in chosen]) if name == KEPT else method_of(name)
    try:
        with vtprune.patch(model(), method=method, **budget) as patch:
            right = answers(chosen, inputs)
            last = patch.last
    except (vtprune.BudgetError, vtprune.MethodError) as error:
        return {"refused": str(error)}
    alive = [
        float(torch.isin(visual[list(one.fact)], kept).float().mean())
        for one, visual, kept in zip(chosen, last.visual, last.kept, strict=True)
    ]
    return {
        "outcomes": "".join(map(str, map(int, right))),
        "fact_kept": [round(share, 3) for share in alive],
        "mean_ratio": round(last.mean_ratio, 4),
    }


def summary(row: dict[str, Any], count: int) -> dict[str, Any]:
    """Adds right answers, their interval, and right answers by depth of the fact to a row."""
    outcomes = row["outcomes"]
    right, total = outcomes.count("1"), len(outcomes)
    depths = [needles.wanted_depth(number, count) for number in range(total)]
    thirds = []
    for third in range(3):
        mine = [int(bit) for bit, depth in zip(outcomes, depths, strict=True) if min(2, int(3 * depth)) == third]
        thirds.append(round(sum(mine) / len(mine), 3) if mine else None)
    interval = [round(bound, 4) for bound in wilson(right, total)]
    return row | {"right": right, "total": total, "interval": interval, "by_depth": thirds}


def measure(
    places: tuple[int, ...], methods: list[str], costs: list[float], count: int, until: int, out: Path, force: bool
) -> None:
    """Runs the trials from 0 to `until` of `count` that are missing in `out`."""
    header = {
        "decoder": "SmolLM2-135M-Instruct Q4_1, dequantized, float32",
        "decoder_sha256": parts.SHA256[parts.GGUF],
        "trials": count,
        "versions": progress.versions(),
    }
    data: dict[str, Any] = header | progress.load(out, header, force)
    rows = [("unpruned", {}), (KEPT, {"ratio": CONTROL_RATIO}), (DROPPED, {})]
    rows += [(name, {"mean_ratio": share}) for share in costs for name in methods]
    todo = [
        (size, start, name, budget)
        for size in places
        for start in range(0, min(until, count), BATCH)
        for name, budget in rows
        if _wanted(data, size, name, budget, start)
    ]

    def one(job: tuple[int, int, str, dict[str, float]]) -> dict[str, Any]:
        size, start, name, budget = job
        if not _wanted(data, size, name, budget, start):  # refused in an earlier trial of this run
            return {}
        return run(name, budget, size, count, start, min(count, start + BATCH))

    for (size, start, name, budget), found in progress.work(
        todo, one, "needles", name=lambda job: f"{job[0]} {job[2]}"
    ):
        row = data.setdefault(str(size), {}).setdefault(key(name, budget), {"method": name, **budget})
        if "refused" in found:
            row["refused"] = found["refused"]
        elif found:
            row["outcomes"] = row.get("outcomes", "") + found["outcomes"]
            row["fact_kept"] = _mean(row, found, start)
            row |= summary(row, count) | {name: found[name] for name in ("mean_ratio",) if name in found}
        progress.save(out, data)


def key(name: str, budget: dict[str, float]) -> str:
    """Name of a row in the result."""
    return " ".join([name, *map(str, budget.values())])


def _mean(row: dict[str, Any], found: dict[str, Any], start: int) -> float | None:
    if "fact_kept" not in found:
        return None
    sums = (row.get("fact_kept") or 0.0) * start + sum(found["fact_kept"])
    return round(sums / (start + len(found["fact_kept"])), 4)


def _wanted(data: dict[str, Any], size: int, name: str, budget: dict[str, float], start: int) -> bool:
    row = data.get(str(size), {}).get(key(name, budget), {})
    return "refused" not in row and len(row.get("outcomes", "")) <= start


def main(argv: list[str] | None = None) -> None:
    parser = command.parser(__doc__, OUT)
    parser.add_argument("--places", type=int, nargs="+", default=list(PLACES), help="visual positions of the text")
    parser.add_argument(
        "--methods",
        nargs="+",
        metavar="NAME[:OPTION=VALUE]",
        default=command.METHODS,
    )
    parser.add_argument("--costs", type=float, nargs="+", default=list(MEAN_RATIOS), help="mean ratios")
    parser.add_argument("--trials", type=int, default=TRIALS)
    parser.add_argument("--until", type=int, help="number of trials after which to stop (default: all)")
    args = parser.parse_args(argv)
    with progress.script(args.out):
        measure(
            tuple(args.places), args.methods, args.costs, args.trials, args.until or args.trials, args.out, args.force
        )
    data = json.loads(args.out.read_text())
    for size, row in itertools.chain.from_iterable(
        ((size, row) for row in data.get(str(size), {}).values()) for size in args.places
    ):
        if "refused" in row:
            print(f"{size:5} {row['method']:22} {row.get('mean_ratio', ''):>6}  refused: {row['refused'][:70]}")
        else:
            low, high = row["interval"]
            cost = row.get("mean_ratio", row.get("ratio", ""))
            print(
                f"{size:5} {row['method']:22} {cost:>6}  {row['right']:3}/{row['total']:3}"
                f"  {low:.2f} to {high:.2f}  thirds {row['by_depth']}  fact kept {row['fact_kept']}"
            )


if __name__ == "__main__":
    main()
