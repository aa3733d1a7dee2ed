# SPDX-License-Identifier: Apache-2.0
"""Helpers for ragged batches: flat rows, `offsets` `[S + 1]` of the groups, `budgets` `[S]`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

LOWEST = torch.finfo(torch.float32).min


def groups(offsets: Tensor, budgets: Tensor) -> Iterator[tuple[int, int, int]]:
    """Yields `(start, stop, count)` of every group; `count` is the budget, at most the group's length."""
    bounds = offsets.tolist()
    for start, stop, budget in zip(bounds[:-1], bounds[1:], budgets.tolist(), strict=True):
        yield start, stop, max(0, min(int(budget), stop - start))


def spans(offsets: Tensor) -> Iterator[tuple[int, int]]:
    """Yields `(start, stop)` of every group."""
    bounds = offsets.tolist()
    yield from zip(bounds[:-1], bounds[1:], strict=True)


def on(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies `tensor` to a device; copies from the host do not wait (memory that is not pinned is staged first)."""
    return tensor.to(device, non_blocking=tensor.device.type == "cpu")


def segment_maximum(values: Tensor, offsets: Tensor) -> Tensor:
    """For each row, the largest of `values` `[M]` in its group: `[M]`."""
    owner = torch.searchsorted(offsets[1:], torch.arange(len(values), device=offsets.device), right=True)
    owner = owner.to(values.device)
    largest = values.new_full((len(offsets),), -torch.inf)
    return largest.scatter_reduce(0, owner, values, "amax")[owner]


def output_columns(budgets: Tensor, max_budget: int | None) -> int:
    """Width of a result: `max_budget`, or else the largest budget, whose reading synchronizes with its device."""
    if max_budget is not None:
        return max_budget
    return max(0, int(budgets.max())) if len(budgets) else 0


def longest_group(offsets: Tensor, total: int, max_length: int | None) -> int:
    """Length of the longest group: `max_length`, or else read from `offsets`, which synchronizes with their device."""
    if max_length is not None:
        return min(max_length, total)
    return total if len(offsets) < 3 else int(offsets.diff().max())


def plan(
    offsets: Tensor, budgets: Tensor, total: int, device: torch.device, max_budget: int | None, max_length: int | None
) -> tuple[Tensor, Tensor, int, int]:
    """Offsets, number of rows to select from each group, `max_budget` and `max_length`, as GPU kernels need them."""
    max_length, max_budget = longest_group(offsets, total, max_length), output_columns(budgets, max_budget)
    offsets = on(offsets, device)
    return offsets, torch.minimum(on(budgets, device), offsets.diff()), max_budget, max_length


def select_by_group(
    offsets: Tensor,
    budgets: Tensor,
    device: torch.device,
    max_budget: int | None,
    choose: Callable[[int, int, int], Tensor],
) -> Tensor:
    """Result `[S, max_budget]` of `choose(start, stop, budget)`, which selects rows of a group, numbered from 0."""
    order = None
    for number, (start, stop, budget) in enumerate(groups(offsets, budgets)):
        chosen = choose(start, stop, budget) if budget > 0 else None
        if chosen is not None and len(budgets) == 1 and len(chosen) == output_columns(budgets, max_budget):
            return chosen[None]
        order = empty_order(budgets, device, max_budget) if order is None else order
        if chosen is not None:
            order[number, : len(chosen)] = chosen + start
    return empty_order(budgets, device, max_budget) if order is None else order


def empty_order(budgets: Tensor, device: torch.device, max_budget: int | None = None) -> Tensor:
    """Result `[S, max_budget]` int64, filled with the padding -1."""
    return torch.full((len(budgets), output_columns(budgets, max_budget)), -1, dtype=torch.int64, device=device)


def on_host(x: Tensor) -> bool:
    """Whether reading a value of `x` does not wait for a device."""
    return x.device.type == "cpu"


def finite(scores: Tensor) -> Tensor:
    """Scores as finite float32, above the minus infinity of selected rows: NaN and -inf become the lowest number.

    On the host, scores that are finite already are returned as they are: a sum is faster than a replacement.
    """
    scores = scores.float()
    if on_host(scores) and math.isfinite(scores.sum()):
        return scores
    return torch.nan_to_num(scores, nan=LOWEST, neginf=LOWEST, posinf=torch.finfo(torch.float32).max)


def factors(length: Tensor, eps: float = 1e-6) -> Tensor:
    """Inverse lengths of rows; zero for rows that are not finite."""
    return torch.where(torch.isfinite(length), 1 / length.clamp_min(eps), 0.0)


def self_cosine(length: Tensor, eps: float = 1e-6) -> Tensor:
    """Cosine of each row with itself, from its length: exactly 1, or 0 for rows that are zero or not finite."""
    return torch.where(torch.isfinite(length), (length / eps).clamp_max(1), 0.0).square()


def unit_rows(rows: Tensor, eps: float = 1e-6) -> Tensor:
    """Normalizes rows along the last dimension, in float32; rows that are zero or not finite become zero."""
    rows = rows.float()
    unit = rows / torch.linalg.vector_norm(rows, dim=-1, keepdim=True).clamp_min(eps)
    return torch.nan_to_num(unit, nan=0.0, posinf=0.0, neginf=0.0)
