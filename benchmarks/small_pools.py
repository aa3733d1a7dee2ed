# SPDX-License-Identifier: Apache-2.0
"""Time of selection with all pairs and with lazy evaluation on a CPU: writes `benchmarks/results/small_pools.json`.

    python -m benchmarks.small_pools

The greedy selections of the kernels have two paths with equal results. Both are timed alternately, in CPU time of
one thread, for several sizes, widths and budgets, on clustered and random rows. `vtprune_kernels/_small.py` selects the
path; a test compares its rule with the result.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import command
from benchmarks.kernel_cases import features
from vtprune_kernels import _small
from vtprune_kernels._cosine import Cosine
from vtprune_kernels.dpp_map import gram as dpp_gram
from vtprune_kernels.dpp_map import vectorized as dpp_lazy
from vtprune_kernels.progressive_mmr import gram as mmr_gram
from vtprune_kernels.progressive_mmr import vectorized as mmr_lazy
from vtprune_kernels.progressive_mmr.duplication import Duplication
from vtprune_kernels.residual_pivots.vectorized import relevance as lengths
from vtprune_kernels.residual_pivots.vectorized import sure_of
from vtprune_kernels.weighted_farthest_point import gram as farthest_gram
from vtprune_kernels.weighted_farthest_point import vectorized as farthest_lazy

OUT = Path(__file__).resolve().parent / "results" / "small_pools.json"
ROWS, SHARES, DATA = (144, 256, 576, 1024, 1296, 2304), (0.05, 0.1, 0.25), ("clustered", "noise")
RULES: tuple = (0.5, 16, 0.25, 4, "linear")  # IWP's
HEADS = ((2, 32), (4, 128))  # KV heads and head size
WIDTHS = (192, 1024, 3584)
Choice = Callable[[], Tensor]


def cases(rows: int, picks: int, data: str) -> Iterator[tuple[str, int, bool, Choice, Choice]]:
    """Yields name, multiplications per pair, whether the all-pairs path is used, and both paths (lazy, all pairs)."""
    relevance = torch.rand(rows, generator=torch.Generator().manual_seed(1)) + 0.1
    for groups, size in HEADS:
        keys, values = (features(rows, groups, size, data=data, seed=seed) * 0.5 for seed in (2, 3))

        def lazy(keys: Tensor = keys, values: Tensor = values) -> Tensor:
            return mmr_lazy.choose(relevance, Duplication(keys, values), picks, *RULES)

        def pairs(keys: Tensor = keys, values: Tensor = values) -> Tensor:
            return mmr_gram.choose(relevance, Duplication(keys, values), picks, *RULES)

        width = 2 * groups * size
        yield "progressive_mmr", width, _small.is_small(rows, width, picks), lazy, pairs
    for width in WIDTHS:
        x = features(rows, width, data=data, seed=4)
        for weight in (None, relevance):
            small = _small.is_small(rows, width, picks)
            yield (
                "weighted_farthest_point" if weight is not None else "farthest_point",
                width,
                small if weight is not None else _small.is_small_for_isolation(rows, width),
                lambda x=x, w=weight: farthest_lazy.choose(Cosine(x), w, picks),  # type: ignore[misc]
                lambda x=x, w=weight: farthest_gram.choose(Cosine(x), w, picks),  # type: ignore[misc]
            )
        kernel = Cosine(x, lengths(x, torch.linalg.vector_norm(x, dim=1), None, torch.tensor([0, rows])))
        yield (
            "residual_pivots",
            width,
            _small.is_small_for_residuals(rows, width, picks),
            lambda k=kernel, d=width: dpp_lazy.choose(k, picks, d, sure_of(k, None)),  # type: ignore[misc]
            lambda k=kernel, d=width: dpp_gram.choose(k, picks, d, sure_of(k, None)),  # type: ignore[misc]
        )
        if picks < width // 2:
            small = _small.is_small(rows, width, picks)
            yield (
                "dpp_map",
                width,
                small,
                lambda x=x, d=width: dpp_lazy.choose(Cosine(x, relevance), picks, d),  # type: ignore[misc]
                lambda x=x, d=width: dpp_gram.choose(Cosine(x, relevance), picks, d),  # type: ignore[misc]
            )


def same(operation: str, some: Tensor, others: Tensor) -> bool:
    """Whether two paths select the same rows; in the same order, except for residual selection.

    Energies of rows that differ by 1e-7 are ranked either way, one after the other.
    """
    if operation == "residual_pivots":
        some, others = some.sort().values, others.sort().values
    return torch.equal(some, others)


def seconds(paths: tuple[Choice, Choice], rounds: int) -> list[float]:
    """Median CPU seconds of both paths, timed alternately."""
    taken: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + 1):
        for path, times in zip(paths, taken, strict=True):
            started = time.process_time()
            path()
            if number:
                times.append(time.process_time() - started)
    return [statistics.median(times) for times in taken]


def measure(rounds: int) -> list[dict[str, Any]]:
    """A row per case."""
    rows = []
    for count, share, data in itertools.product(ROWS, SHARES, DATA):
        picks = round(share * count)
        for name, width, small, lazy, pairs in cases(count, picks, data):
            equal = same(name, lazy(), pairs())
            times = dict(zip(("lazy", "pairs"), seconds((lazy, pairs), rounds), strict=True))
            row = {"operation": name, "rows": count, "width": width, "picks": picks, "data": data}
            rows.append({**row, **times, "equal": equal, "small": small})
    return rows


def main() -> None:
    from vtprune.study import progress

    parser = command.parser("Both paths of the greedy selections on groups of several sizes.", OUT, resumes=False)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    rows = measure(args.rounds)
    progress.save(args.out, {"versions": progress.versions(), "rounds": args.rounds, "rows": rows})
    taken, best = (sum(f(row) for row in rows) for f in (of_taken, lambda row: min(row["lazy"], row["pairs"])))
    print(f"{len(rows)} cases; the paths that are taken need {taken / best:.2f} times the time of the faster ones")


def of_taken(row: dict[str, Any]) -> float:
    """Seconds of the path that the rule selects."""
    return float(row["pairs" if row["small"] else "lazy"])


if __name__ == "__main__":
    main()
