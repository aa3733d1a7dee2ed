# SPDX-License-Identifier: Apache-2.0
"""Targets of the kernels on one H200, and their measurement on the current GPU.

    python -m benchmarks.kernels --device cuda     # includes these, and fails if one is missed

Sizes: 160 of 2,880 tokens, eight KV heads of 128, 4,096-wide features, bfloat16; and a video, 1,024 of 32,768. A
selection is timed as called, which includes the host's launch overhead, and replayed from a CUDA graph, which measures
the device only. The target applies to the replay; capture succeeds only if nothing synchronizes with the device.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import vtprune_kernels
from benchmarks.kernel_cases import features, plain_dpp, plain_farthest, plain_map, plain_mmr
from benchmarks.kernel_certificate import shortfall

GROUPS, HEADS, SIZE, WIDTH, QUESTION = 8, 32, 128, 4096, 40


@dataclass
class Decision:
    """One selection and its targets.

    Attributes:
        what: Description.
        run: Runs the selection; returns `[1, K]` rows.
        check: Shortfall of an order, by `benchmarks.kernel_certificate`.
        seconds: Target time.
        plain: The published formulation, or None if there is only a target time.
        times: Target speedup over it.
    """

    what: str
    run: Callable[[], Tensor]
    check: Callable[[Tensor], float]
    seconds: float
    plain: Callable[[], Any] | None = None
    times: float = 10.0


def decisions(
    device: torch.device, dtype: torch.dtype, rows: int, keep: int, aims: dict[str, float], plain: bool, scale: int = 1
) -> Iterator[Decision]:
    """The selections at one size; `scale` divides widths and heads, for tests of the benchmark itself."""
    size, width = SIZE // scale, WIDTH // scale
    offsets, budgets = (torch.tensor(x, device=device) for x in ([0, rows], [keep]))
    hints = {"max_budget": keep, "max_length": rows}
    name = f"{keep} of {rows}"

    def there(*shape: int, seed: int) -> Tensor:
        return features(rows, *shape, data="clustered", seed=seed).to(device, dtype)

    relevance = torch.rand(rows, generator=torch.Generator().manual_seed(1)).to(device) + 0.1
    k, v = there(GROUPS, size, seed=2) * 0.5, there(GROUPS, size, seed=3)
    q = features(QUESTION, HEADS, size, data="noise", seed=5).to(device, dtype)
    text, text_v = (features(QUESTION, GROUPS, size, data="noise", seed=s).to(device, dtype) for s in (6, 7))
    keys, values = torch.cat([k, text]), torch.cat([v, text_v])
    places = [torch.tensor(x, device=device) for x in ([0, QUESTION], [0, rows + QUESTION])]
    order, visual = torch.arange(rows, rows + QUESTION, device=device), torch.arange(rows, device=device)

    def magnitude() -> Tensor:
        found = vtprune_kernels.rank1_relevance(q, keys, values, *places, order, visual, size**-0.5)
        return torch.exp(found - found.max())

    def iwp() -> Tensor:
        return vtprune_kernels.progressive_mmr(magnitude(), k, v, offsets, budgets, **hints)

    def plain_iwp() -> Tensor:
        attention = plain_map(q.transpose(0, 1), keys.transpose(0, 1), size**-0.5, order)[..., :rows]
        norm = v.float().norm(dim=-1).T.repeat_interleave(HEADS // GROUPS, 0)
        score = (attention * norm[:, None]).mean((0, 1))
        return plain_mmr(score / score.max(), k, v, keep)

    yield Decision(
        f"iwp, relevance and choice, {name}", iwp, lambda x: shortfall("progressive_mmr", x, magnitude(), k, v),
        aims["iwp"], plain_iwp if plain else None,
    )  # fmt: skip
    x = there(width, seed=4)
    for weights in (None, relevance):
        rule = "farthest point" if weights is None else "weighted farthest point"
        yield Decision(
            f"{rule}, {name}",
            lambda w=weights: vtprune_kernels.weighted_farthest_point(x, w, offsets, budgets, **hints),
            lambda o, w=weights: shortfall("weighted_farthest_point", o, x, w), aims["farthest"],
            (lambda w=weights: plain_farthest(x, w, keep)) if plain else None,
        )  # fmt: skip
    yield Decision(
        f"DPP, {name}", lambda: vtprune_kernels.dpp_map(x, relevance, offsets, budgets, **hints),
        lambda o: shortfall("dpp_map", o, x, relevance), aims["dpp"],
        (lambda: plain_dpp(x, relevance, keep)) if plain else None,
    )  # fmt: skip


def replayed(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Captures a selection in a CUDA graph; returns its replay function and output tensor."""
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph.replay, result


def measure(
    decision: Decision,
    seconds: Callable[..., list[list[float]]],
    extra_memory: Callable[[Callable[[], Any], torch.device], int],
    device: torch.device,
    budget: float,
) -> dict[str, Any]:
    """Checks and times one selection with the functions of `benchmarks.kernels`."""
    row: dict[str, Any] = {"what": decision.what, "aim_seconds": decision.seconds, "met": False}
    row["shortfall"] = decision.check(decision.run()[0])
    if not row["shortfall"] <= 1e-4:
        return {**row, "error": "a pick was not the best row"}
    row["seconds"] = statistics.median(seconds(device, budget, decision.run)[0])
    row["extra_bytes"] = extra_memory(decision.run, device)
    best = row["seconds"]
    if device.type == "cuda":
        replay, result = replayed(decision.run)
        replay()
        row["shortfall_replayed"] = decision.check(result[0].clone())
        row["replayed_seconds"] = best = statistics.median(seconds(device, budget, replay)[0])
    row["met"] = best < decision.seconds
    if decision.plain is not None:
        row["plain_seconds"] = statistics.median(seconds(device, budget, decision.plain)[0])
        row |= {"aim_times_plain": decision.times, "times_plain": row["plain_seconds"] / best}
        row["met"] = row["met"] and row["times_plain"] >= decision.times
    return row


def all_decisions(device: torch.device) -> Iterator[Decision]:
    """Every selection with a target, for an image and a video."""
    image = {"iwp": 0.5e-3, "farthest": 1e-3, "dpp": 1.5e-3}
    video = dict.fromkeys(image, 20e-3)
    for rows, keep, aims in ((2880, 160, image), (32768, 1024, video)):
        yield from decisions(device, torch.bfloat16, rows, keep, aims, plain=aims is image)


def describe(row: dict[str, Any]) -> str:
    name = f"{row['what']:48}"
    if "error" in row:
        return f"{name} {row['error']} (by {row['shortfall']:.1e})"
    replayed = row.get("replayed_seconds", row["seconds"])
    times = f"  {row['times_plain']:.1f} x plain (aim {row['aim_times_plain']:.0f})" if "times_plain" in row else ""
    return (
        f"{name} {replayed * 1e3:.2f} ms replayed, {row['seconds'] * 1e3:.2f} ms called (aim "
        f"{row['aim_seconds'] * 1e3:.1f}){times}, {row['extra_bytes'] / 2**20:.0f} MiB  "
        f"{'met' if row['met'] else 'MISSED'}"
    )
