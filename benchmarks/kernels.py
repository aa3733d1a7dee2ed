# SPDX-License-Identifier: Apache-2.0
"""Times the kernels, and writes `benchmarks/results/kernels-<device>.json`.

    python -m benchmarks.kernels                    # on the GPU if present, else on the CPU
    python -m benchmarks.kernels --device cpu --threads 1

For every operation: time of the kernel, of its specification and of the plain published formulation on the same inputs,
extra memory, and share of the machine's limit. The limit is the larger of bytes over the bandwidth of a large copy and
operations over the rate of a large matrix product, both measured in the same run. It counts the work of the definition,
so lazy evaluation can exceed 100 %. An operation whose result differs from the specification, and is not optimal by its
own rule up to rounding, is not timed. On a GPU, selections with a target (`benchmarks.kernel_targets`) are measured
too, and the exit status is 1 if one is missed. Cases are written one by one, an interrupted benchmark resumes, and
times of another device or version are overwritten only with `--force`.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
import weakref
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import vtprune
from benchmarks import kernel_targets
from benchmarks.kernel_cases import Case, cases
from benchmarks.kernel_certificate import RULES, shortfall
from vtprune.study import progress

RESULTS = Path(__file__).resolve().parent / "results"


class Memory(TorchDispatchMode):
    """Counts the bytes of live tensors created under it, without temporary memory inside operators."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def release(self, key: int, size: int) -> None:
        self.now -= size
        self.known.discard(key)

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = operator(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in given | self.known:
                    self.known.add(storage._cdata)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self.release, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result


def extra_memory(run: Callable[[], Any], device: torch.device) -> int:
    """Peak number of bytes that a call allocates."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with Memory() as memory:
        run()
    return memory.peak


def seconds(device: torch.device, budget: float, *runs: Callable[[], Any], least: int = 3) -> list[list[float]]:
    """Times of repeated, interleaved calls, so that load affects all equally; on a GPU with a cold cache."""
    times: list[list[float]] = [[] for _ in runs]
    wipe = torch.empty(64 * 2**20, dtype=torch.int32, device=device) if device.type == "cuda" else None
    for run in runs:
        run()
    start = time.perf_counter()
    while len(times[0]) < least or (time.perf_counter() - start < budget * len(runs) and len(times[0]) < 200):
        for run, mine in zip(runs, times, strict=True):
            if wipe is None:
                begin = time.perf_counter()
                run()
                mine.append(time.perf_counter() - begin)
            else:
                wipe.zero_()
                first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                first.record()
                run()
                last.record()
                torch.cuda.synchronize()
                mine.append(first.elapsed_time(last) / 1000)
    return times


def ceilings(device: torch.device, dtype: torch.dtype, budget: float) -> dict[str, float]:
    """Bytes per second of a large copy, and operations per second of a large matrix product in `dtype` (no TF32)."""
    source = torch.randn((2**28 if device.type == "cuda" else 2**25), device=device)
    target = torch.empty_like(source)
    copy = min(seconds(device, budget, lambda: target.copy_(source))[0])
    side = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, side, side, device=device).to(dtype).unbind()
    product = min(seconds(device, budget, lambda: a @ b)[0])
    return {"bytes_per_second": 2 * source.nbytes / copy, "flops_per_second": 2 * side**3 / product}


def agrees(case: Case, dtype: torch.dtype) -> str:
    """`"exact"` or the largest difference from the specification; raises `AssertionError` if it is too large."""
    found, expected = case.run(), case.naive()
    worst = 0.0
    for mine, theirs in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        if mine.is_floating_point():
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))
            worst = max(worst, float((mine - theirs).abs().max() / theirs.abs().max()))
        elif not torch.equal(mine, theirs):
            least = shortfall(case.operation, mine[0], *case.arguments[:-2]) if case.operation in RULES else torch.inf
            assert least <= 1e-5, f"{int((mine != theirs).sum())} of {mine.numel()} entries differ"
            return f"every pick is the best row within {least:.1e}"
    return "exact" if worst == 0 else f"{worst:.1e} relative to the largest value"


def about(case: Case, dtype: torch.dtype) -> dict[str, str]:
    """Key of a row."""
    kind = str(dtype).removeprefix("torch.")
    return {"operation": case.operation, "size": case.size, "data": case.data, "dtype": kind}


def measure(case: Case, device: torch.device, dtype: torch.dtype, budget: float) -> dict[str, Any]:
    row: dict[str, Any] = about(case, dtype)
    try:
        row["agrees"] = agrees(case, dtype)
    except AssertionError as error:
        return {**row, "agrees": None, "error": str(error).strip().splitlines()[0]}
    own, plain = seconds(device, budget, case.run, case.plain)
    begin = time.perf_counter()
    case.naive()
    if device.type == "cuda":
        torch.cuda.synchronize()
    naive = time.perf_counter() - begin
    median = statistics.median(own)
    return {
        **row,
        "seconds": median,
        "seconds_least": min(own),
        "runs": len(own),
        "plain_seconds": statistics.median(plain),
        "plain_seconds_least": min(plain),
        "naive_seconds": naive,
        "speed_against_plain": statistics.median(plain) / median,
        "speed_against_naive": naive / median,
        "flops": case.flops,
        "bytes": case.bytes,
        "extra_bytes": extra_memory(case.run, device),
        "plain_extra_bytes": extra_memory(case.plain, device),
    }


def against_limit(row: dict[str, Any], limits: dict[str, float]) -> dict[str, Any]:
    """Adds the machine's minimum time, and its share of the measured time."""
    if row["agrees"] is None:
        return row
    limit = max(row["bytes"] / limits["bytes_per_second"], row["flops"] / limits["flops_per_second"])
    return {**row, "limit_seconds": limit, "share_of_limit": limit / row["seconds"]}


def describe(row: dict[str, Any]) -> str:
    name = f"{row['operation']:24} {row['size']:52} {row['data']:9}"
    if row["agrees"] is None:
        return f"{name} DIFFERS: {row['error']}"
    return (
        f"{name} {row['seconds'] * 1e3:9.2f} ms  {row['speed_against_plain']:6.1f} x plain  "
        f"{row['speed_against_naive']:7.1f} x naive  {100 * row['share_of_limit']:5.0f} % of the limit  "
        f"{row['extra_bytes'] / 2**20:7.1f} MiB, plain {row['plain_extra_bytes'] / 2**20:7.1f}"
    )


def header(device: torch.device, budget: float, sizes: dict[str, int]) -> dict[str, Any]:
    """Conditions that must be equal for times to be comparable."""
    triton = sys.modules.get("triton")
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "seconds": budget,
        "sizes": sizes,
        "versions": {
            "vtprune": vtprune.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": triton.__version__ if triton else None,
        },
    }


def benchmark(
    device: torch.device,
    dtypes: list[torch.dtype],
    budget: float = 1.0,
    out: Path | None = None,
    force: bool = False,
    **sizes: int,
) -> dict[str, Any]:
    """Measures all cases in all dtypes that are missing in `out`; writes it after each.

    Raises:
        StaleResultError: `out` holds times of another device, version or size.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    data: dict[str, Any] = header(device, budget, sizes)
    old = progress.load(out, data, force)
    data["time"] = old.get("time", datetime.now(timezone.utc).isoformat(timespec="seconds"))
    data |= {"load": old.get("load", 0.0), "ceilings": old.get("ceilings", {})}
    data["rows"] = [
        row for row in old.get("rows", []) if row["agrees"] is not None
    ]  # remeasures cases with wrong results
    done = {_key(row) for row in data["rows"]}
    each = sum(1 for _ in cases(torch.device("cpu"), torch.float32, rows=8, keep=2, scale=16))
    with progress.bar("cases", each * len(dtypes), len(done)) as step:
        for dtype in dtypes:
            for case in cases(device, dtype, **sizes):
                if _key(about(case, dtype)) not in done:
                    add(data, case, device, dtype, budget)
                    progress.save(out, data)
                    step(case.operation)
    if device.type == "cuda":
        data["targets"] = [row for row in old.get("targets", []) if row["met"]]  # remeasures missed targets
        for decision in kernel_targets.all_decisions(device):
            if decision.what not in {row["what"] for row in data["targets"]}:
                data["targets"].append(kernel_targets.measure(decision, seconds, extra_memory, device, budget))
                progress.save(out, data)
        print("\n".join(map(kernel_targets.describe, data["targets"])))
    for name, limits in data["ceilings"].items():
        print(f"{name}: {limits['bytes_per_second'] / 1e9:.1f} GB/s, {limits['flops_per_second'] / 1e9:.1f} GFLOP/s")
        for row in data["rows"]:
            if row["dtype"] == name:
                print(describe(row), flush=True)
    return data


def add(data: dict[str, Any], case: Case, device: torch.device, dtype: torch.dtype, budget: float) -> None:
    """Measures a case, and updates the share of the limit of all rows of its dtype with the highest ceilings so far."""
    name = about(case, dtype)["dtype"]
    limits = data["ceilings"].setdefault(name, {})
    # Measured before every case: on a shared machine only the best of many measurements is a limit.
    for what, value in ceilings(device, dtype, budget / 4).items():
        limits[what] = max(limits.get(what, 0.0), value)
    data["rows"].append(measure(case, device, dtype, budget))
    data["rows"] = [against_limit(row, limits) if row["dtype"] == name else row for row in data["rows"]]
    data["load"] = max(data["load"], progress.load_average() or 0.0)


def _key(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(row[name] for name in ("operation", "size", "data", "dtype"))


def main() -> int:
    parser = argparse.ArgumentParser(description="Times the kernels.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads of PyTorch")
    parser.add_argument("--seconds", type=float, default=1.0, help="seconds of repetition per call")
    parser.add_argument("--rows", type=int, default=2880, help="tokens to select from (default: %(default)s)")
    parser.add_argument("--keep", type=int, default=160, help="tokens kept (default: %(default)s)")
    parser.add_argument("--scale", type=int, default=1, help="divides widths and heads, to try the command")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    parser.add_argument("--force", action="store_true", help="overwrite existing results")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    dtypes = [torch.float32, torch.bfloat16] if device.type == "cuda" else [torch.float32]
    name = torch.cuda.get_device_name().lower().replace(" ", "-") if device.type == "cuda" else "cpu"
    path = args.out / f"kernels-{name}.json"
    sizes = {"rows": args.rows, "keep": args.keep, "scale": args.scale}
    with progress.script(path):
        data = benchmark(device, dtypes, args.seconds, path, args.force, **sizes)
    wrong = [row["operation"] for row in data["rows"] if row["agrees"] is None]
    print(f"wrote {path}; {len(data['rows']) - len(wrong)} cases agree with their specification, {len(wrong)} do not")
    missed = [row["what"] for row in data.get("targets", []) if not row["met"]]
    if missed:
        print(f"missed: {'; '.join(missed)}")
    return 1 if wrong or missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
