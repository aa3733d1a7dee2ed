# SPDX-License-Identifier: Apache-2.0
"""Memory growth of a process that generates for long; methods, families and prompts alternate."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from typing import Any

import torch
from families import FAMILIES, Image, Video
from standing import accepted, generated, model

import vtprune

ROUND = 10  # generations under one patch


def resident() -> int:
    """Resident memory of the process in bytes."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def tensors() -> int:
    """Number of tensors tracked by the garbage collector."""
    gc.collect()
    return sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())


def prompts(family: str) -> list[dict[str, torch.Tensor]]:
    """Batches of one to three samples, with none to four pictures, and clips where the family takes them."""
    make = FAMILIES[family]
    layouts: list[list[list[Any]]] = [
        [[3, Image(0), 5]],
        [[2, Image(1), 4, Image(2), 7], [9]],
        [[Image(3), 1, Image(0), 2, Image(1), Image(2), 6]],
        [[6], [3, Image(2)], [1, Image(0), 8]],
        [[7], [4]],
    ]
    if make.video is not None:
        layouts.append([[3, Video(0), 5], [2, Image(1), 4]])
    return [make.batch(layout, padding) for layout in layouts for padding in ("left", "right")]


def turns() -> Iterator[tuple[str, str]]:
    """Cycles through all pairs of family and method."""
    while True:
        longest = max(len(accepted(family)) for family in FAMILIES)
        for number in range(longest):
            for family in FAMILIES:
                names = accepted(family)
                if number < len(names):
                    yield family, names[number]


def run(generations: int, warm_up: int) -> dict[str, Any]:
    """Runs generations and measures the memory of the process.

    Args:
        generations: Number of measured generations.
        warm_up: Generations before, which fill allocators and caches of the libraries.

    Returns:
        dict: Resident bytes at the start and at the end (means over a tenth of the run), their growth, and numbers of
        live tensors.
    """
    batches = {family: prompts(family) for family in FAMILIES}
    seen: list[int] = []
    alive_before = tried = 0
    pairs = set()
    for family, method in turns():
        if tried >= warm_up + generations:
            break
        pairs.add((family, method))
        budget = {"ratio": 0.3} if len(pairs) % 2 else {"keep": 3}
        with vtprune.patch(model(family), method=method, **budget):  # type: ignore[arg-type]
            for number in range(ROUND):
                if tried == warm_up:
                    alive_before = tensors()
                generated(model(family), batches[family][(tried + number) % len(batches[family])])
                tried += 1
                if tried > warm_up:
                    seen.append(resident())
    alive = tensors()
    tenth = max(1, len(seen) // 10)
    start, end = sum(seen[:tenth]) / tenth, sum(seen[-tenth:]) / tenth
    return {
        "generations": len(seen),
        "warm_up": warm_up,
        "pairs_of_family_and_method": len(pairs),
        "resident_start_bytes": round(start),
        "resident_end_bytes": round(end),
        "resident_most_bytes": max(seen),
        "growth": round(end / start - 1, 5),
        "tensors_start": alive_before,
        "tensors_end": alive,
    }


def check(result: dict[str, Any]) -> None:
    """Asserts that memory grew by less than 1 %."""
    assert result["growth"] < 0.01, result
