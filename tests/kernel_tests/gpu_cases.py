# SPDX-License-Identifier: Apache-2.0
"""Calls of all Triton operations, at sizes of real models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from unittest import mock

import torch


def launches(dtype: torch.dtype, device: str = "cpu") -> Iterator[tuple[str, Callable[[], object]]]:
    """Yields the name of each operation and a call of it on random inputs of `dtype`."""

    def call(operation: str, *arguments: object, **options: object) -> tuple[str, Callable[[], object]]:
        run = getattr(import_module(f"vtprune_kernels.{operation}.triton"), operation)
        return f"{operation} {sorted(options)}", lambda: run(*arguments, **options)

    def choice(operation: str, *arguments: object, **options: object) -> Iterator[tuple[str, Callable[[], object]]]:
        """A selection with the matrix of all pairs, and without it."""
        name, run = call(operation, *arguments, max_length=600, **options)
        yield name, run
        module = import_module("vtprune_kernels._triton_pairs")
        yield f"{name} without a matrix", lambda: mock.patch.object(module, "MATRIX_BYTES", 0)(run)()

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    rows, offsets, budgets = 1000, torch.tensor([0, 600, 1000], device=device), torch.tensor([40, 9], device=device)
    relevance = torch.rand(rows, device=device)
    inputs = (relevance, random(rows, 4, 128), random(rows, 4, 128), offsets, budgets)
    yield from choice("progressive_mmr", *inputs, max_budget=40)
    yield from choice("progressive_mmr", *inputs, objective="log", max_budget=40)
    yield from choice("progressive_mmr", *inputs, pool=1, growth=1.0, max_budget=40)
    for size in (60, 64, 256):
        wide = (relevance, random(rows, 2, size), random(rows, 2, size), offsets, budgets)
        yield from choice("progressive_mmr", *wide, max_budget=40)

    query_offsets, order = torch.tensor([0, 9, 21], device=device), torch.full((21,), 599, device=device)
    visual = torch.cat([torch.arange(30, 550), torch.arange(630, 970)]).to(device)
    for heads, groups, size in ((28, 4, 128), (8, 1, 256)):
        q, k, v = random(21, heads, size), random(rows, groups, size), random(rows, groups, size)
        places = (query_offsets, offsets, order)
        yield call("attention_rows", q, k, *places, 0.1)
        yield call("attention_rows", q, k, *places, 0.1, softcap=50.0, reduce="none", max_length=600)
        yield call("rank1_relevance", q, k, v, *places, visual, 0.1)
        yield call("rank1_relevance", q, k, v, *places, visual, 0.1, reduce="max", normalize="visual", softcap=50.0)
    q, k = random(2, 16, 577, 72), random(2, 16, 577, 72)
    yield call("received_attention", q, k, 0.1)
    yield call("transition_variation", random(rows, 3584), random(rows, 3584))
    yield from choice("weighted_farthest_point", random(rows, 3584), None, offsets, budgets, max_budget=40)
    yield from choice("weighted_farthest_point", random(rows, 3584), relevance, offsets, budgets, max_budget=40)
    yield from choice("dpp_map", random(rows, 3584), relevance, offsets, budgets, max_budget=40)
    yield from choice("facility_location", random(rows, 3584), None, offsets, budgets, max_budget=40)
    yield from choice(
        "facility_location", random(rows, 3584), relevance, offsets, budgets, max_budget=40, combine="sum"
    )
    yield from choice("residual_pivots", random(rows, 3584), relevance, offsets, budgets, max_budget=40)
    cache = random(2, 4, 500, 128).transpose(1, 2)
    yield call("compact", [random(2, 500, 3584), cache, cache], torch.arange(100, device=device).repeat(2, 1))
