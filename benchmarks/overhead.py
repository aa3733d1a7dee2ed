# SPDX-License-Identifier: Apache-2.0
"""Operations that pruning adds to a prefill and to a decoding step: writes `benchmarks/results/overhead.json`.

    python -m benchmarks.overhead                                # all settings
    python -m benchmarks.overhead --settings "2304 tokens" --rounds 3
    python -m benchmarks.overhead --settings built-in --methods iwp random --out /tmp/overhead.json

Rows of other settings that the file has already stay in it.

Counts are the same on every machine: tensor operations (each is a launch on a GPU), Python calls, allocations of
tensors, and reads of values by the host (each waits for a GPU unless the tensor is on the host anyway). They stand
beside CPU time of one thread, medians of runs in turn. The *limit* is what a prompt of only the kept tokens costs from
the start, the vision tower on the whole picture included. A method's possible gain is the time between unpruned and
the limit; for a method that cuts inside the decoder the layers before the cut run unpruned in its own limit.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import vtprune
from benchmarks import command, peers
from vtprune import refvlm
from vtprune.bench.limit import short_prompt
from vtprune.core.budget import Budget
from vtprune.study import progress

OUT = Path(__file__).resolve().parent / "results" / "overhead.json"
METHODS = (
    "random",
    "resprune",
    "divprune",
    "plain-divprune",
    "iwp",
    "fastv",
    "scope",
    "cdpruner",
    "dart",
    "visionzip",
    "vispruner",
    "zoo_prune",
)
SETTINGS = {"built-in": None, "1024 tokens": 32, "2304 tokens": 48}  # side of the picture in patches
RATIO = 0.1
READS = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "unique", "unique2", "unique_dim")


@dataclass
class Counts:
    """Counts of one call.

    Attributes:
        operations: Tensor operations that reach a backend.
        reads: Operations that return a value, or a shape that depends on one, to the host.
        calls: Python function calls.
        allocations: Operations that allocate their result.
    """

    operations: int
    reads: int
    calls: int
    allocations: int


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()
        self.allocations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[func.overloadpacket.__name__] += 1
        output = func(*args, **(kwargs or {}))
        returns = func._schema.returns
        self.allocations += bool(returns) and returns[0].alias_info is None and isinstance(output, torch.Tensor)
        return output


def count(run: Callable[[], Any]) -> Counts:
    """Counts of a call, after a warm-up call."""
    with _Operations() as operations:
        run()
    entered = 0

    def enter(frame: Any, event: str, arg: Any) -> None:
        nonlocal entered
        entered += event == "call"

    sys.setprofile(enter)
    try:
        run()
    finally:
        sys.setprofile(None)
    reads = sum(operations.seen[name] for name in READS)
    return Counts(sum(operations.seen.values()), reads, entered, operations.allocations)


def seconds(runs: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median CPU seconds of alternating calls."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            started = time.process_time()
            run()
            times[name].append(time.process_time() - started)
    return {name: statistics.median(spent) for name, spent in times.items()}


@dataclass
class Setting:
    """A model and a prompt with one picture.

    Attributes:
        model: Without a patch.
        inputs: Arguments of the model.
    """

    model: Any
    inputs: dict[str, Any]

    def __post_init__(self) -> None:
        self.parts = vtprune.inspect(self.model)
        self.visual = self.parts.is_placeholder(self.inputs["input_ids"])

    def prefill(self) -> Any:
        return self.model(**self.inputs, use_cache=True)

    def limit(self, first: int = 0) -> Any:
        """A prefill with only the kept tokens; with `first` the layers before it run on all of them."""
        features = self.parts.composite.get_image_features(self.inputs["pixel_values"]).pooler_output
        embeds = self.parts.embeddings(self.inputs["input_ids"])
        rows = torch.cat(list(features)).flatten(0, -2).to(embeds)
        embeds = embeds.masked_scatter(self.visual[..., None].expand_as(embeds), rows)
        short = short_prompt(embeds, self.visual, Budget(RATIO))
        with _layers(self.parts.decoder, slice(first, None)):
            output = self.model(**short, use_cache=True)
        if first:
            with _layers(self.parts.decoder, slice(0, first)):
                self.parts.decoder(inputs_embeds=embeds, attention_mask=self.inputs["attention_mask"])
        return output

    def step(self, output: Any, length: int) -> Callable[[], Any]:
        """A decoding step after a prefill of `length` columns, which can be repeated: it takes its column back."""
        mask = torch.ones(1, length + 1, dtype=torch.long)
        cache, token = output.past_key_values, self.inputs["input_ids"][:, -1:]

        def run() -> None:
            self.model(input_ids=token, attention_mask=mask, past_key_values=cache, use_cache=True)

        def repeatable() -> None:
            run()
            for layer in cache.layers:
                layer.crop(-1)

        return repeatable


@contextmanager
def _layers(decoder: Any, which: slice) -> Iterator[None]:
    """Runs a decoder with some of its layers only."""
    layers = decoder.layers
    decoder.layers = layers[which]
    for number, layer in enumerate(decoder.layers):
        layer.self_attn.layer_idx = number
    try:
        yield
    finally:
        decoder.layers = layers
        for number, layer in enumerate(layers):
            layer.self_attn.layer_idx = number


def setting(name: str) -> Setting:
    """The built-in LLaVA, or one with random weights: a tower without a class token, a decoder of 26 M parameters."""
    side = SETTINGS[name]
    if side is None:
        model, processor = refvlm.load()
        scene = refvlm.scenes.scene(0)
        text = refvlm.prompt(scene.questions[0].text)
        return Setting(model, dict(processor(images=scene.image, text=text, return_tensors="pt")))
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    tower = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 4, "num_attention_heads": 6}
    decoder = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8}
    config = LlavaConfig(
        vision_config={"model_type": "siglip_vision_model", "image_size": 8 * side, "patch_size": 8, **tower},
        text_config={"model_type": "llama", "vocab_size": 1000, "num_key_value_heads": 4, **decoder},
        image_token_id=999,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    text = torch.arange(10, 50)[None]
    ids = torch.cat([text[:, :4], torch.full((1, side * side), 999), text[:, 4:]], 1)
    pixels = torch.randn(1, 3, 8 * side, 8 * side)
    return Setting(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels})


@torch.no_grad()
def measure(name: str, methods: list[str], rounds: int) -> list[dict[str, Any]]:
    """A row for unpruned, for the limit and for every method: counts of a prefill and of a step, and CPU seconds."""
    where = setting(name)
    length = where.inputs["input_ids"].shape[1]
    kept = length - int(where.visual.sum()) + max(1, round(RATIO * int(where.visual.sum())))
    rows = []
    runs: dict[str, tuple[Callable[[], Any], int]] = {
        "unpruned": (where.prefill, length),
        "limit": (where.limit, kept),
    }
    for variant, (run, columns) in runs.items():
        rows.append(_row(name, variant, run, where, columns) | _times({variant: run}, rounds))
    for method in methods:
        with vtprune.patch(where.model, ratio=RATIO, method=method) as patch:
            row = _row(name, method, where.prefill, where, length)
            assert patch.last is not None
            first = patch.schedule[0].layer

            def unpruned() -> Any:
                with patch.paused():
                    return where.prefill()

            def limit() -> Any:
                with patch.paused():
                    return where.limit(first)  # noqa: B023

            sides = {"pruned": where.prefill, "unpruned": unpruned, "own_limit": limit}
            row["seconds"] = seconds(sides, rounds)
            row["selection_seconds"] = _selection_seconds(where, patch, rounds)
            steps = {}
            with patch.paused():
                steps["unpruned"] = where.step(where.prefill(), length)
            steps["pruned"] = where.step(where.prefill(), length)
            row["step_seconds"] = seconds(steps, 10 * rounds)
            rows.append(row)
    return rows


def _selection_seconds(where: Setting, patch: vtprune.Patch, rounds: int) -> float:
    """Median time of the selection; the records are read between prefills, which make no record unless it is read."""
    spent = []
    for _ in range(rounds):
        where.prefill()
        assert patch.last is not None
        spent.append(patch.last.selection_time)
    return statistics.median(spent)


def _times(runs: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, Any]:
    return {"seconds": seconds(runs, rounds)}


def _row(name: str, variant: str, run: Callable[[], Any], where: Setting, length: int) -> dict[str, Any]:
    run()
    step = where.step(run(), length)
    step()
    gc.collect()
    return {"setting": name, "variant": variant, "prefill": vars(count(run)), "step": vars(count(step))}


def show(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Prints a line for every row."""
    base = {row["setting"]: row for row in rows if row["variant"] == "unpruned"}
    for row in rows:
        own, step = base[row["setting"]]["prefill"], base[row["setting"]]["step"]
        share = {key: f"{row['prefill'][key] / max(own[key], 1):.2f}" for key in own}
        steps = {key: row["step"][key] - step[key] for key in step}
        times = row["seconds"]
        gain = ""
        if "own_limit" in times:
            possible = times["unpruned"] - times["own_limit"]
            gain = f"gain {(times['unpruned'] - times['pruned']) / possible:5.0%} of {1e3 * possible:.1f} ms"
            pace = row["step_seconds"]["pruned"] / row["step_seconds"]["unpruned"]
            gain += f", selection {row['selection_seconds'] / times['unpruned']:.0%}, a step {pace:.3f}"
        yield f"{row['setting']:12} {row['variant']:10} {share} step {steps} " + gain


def main() -> None:
    parser = command.parser("What pruning adds to a prefill and to a decoding step.", OUT, resumes=False)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    peers.register_all()
    before = json.loads(args.out.read_text())["rows"] if args.out.exists() else []
    one = partial(measure, methods=args.methods, rounds=args.rounds)
    measured: list[dict[str, Any]] = []
    for _, found in progress.work(args.settings, one, "settings"):
        measured += [{**row, "rounds": args.rounds} for row in found]
        new = {row["setting"] for row in measured}
        rows = [row for row in before if row["setting"] not in new] + measured
        rows.sort(key=lambda row: list(SETTINGS).index(row["setting"]))
        progress.save(args.out, {"versions": progress.versions(), "ratio": RATIO, "rows": rows})
    print("\n".join(show(measured)))


if __name__ == "__main__":
    main()
