# SPDX-License-Identifier: Apache-2.0
"""The ragged batch: flat rows, `segments` `[S + 1]` with the offsets of the pools, `budgets` `[S]`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

LOWEST = torch.finfo(torch.float32).min


def pools(segments: Tensor, budgets: Tensor) -> Iterator[tuple[int, int, int]]:
    """Yields `(start, stop, count)` of every pool; a budget above the pool's length means the whole pool."""
    offsets = segments.tolist()
    for start, stop, budget in zip(offsets[:-1], offsets[1:], budgets.tolist(), strict=True):
        yield start, stop, max(0, min(int(budget), stop - start))


def spans(segments: Tensor) -> Iterator[tuple[int, int]]:
    """Yields `(start, stop)` of every pool."""
    offsets = segments.tolist()
    yield from zip(offsets[:-1], offsets[1:], strict=True)


def on(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on a device; a copy from the host does not wait for it (memory that is not pinned is staged first)."""
    return tensor.to(device, non_blocking=tensor.device.type == "cpu")


def segment_maximum(values: Tensor, segments: Tensor) -> Tensor:
    """`[M]` the largest of `values` `[M]` in the pool of each row."""
    owner = torch.searchsorted(segments[1:], torch.arange(len(values), device=segments.device), right=True)
    owner = owner.to(values.device)
    largest = values.new_full((len(segments),), -torch.inf)
    return largest.scatter_reduce(0, owner, values, "amax")[owner]


def output_width(budgets: Tensor, width: int | None) -> int:
    """Columns of a result; budgets on a device are read once where no width is given, and that waits for it."""
    if width is not None:
        return width
    return max(0, int(budgets.max())) if len(budgets) else 0


def longest_pool(segments: Tensor, total: int, longest: int | None) -> int:
    """Rows of the longest pool; offsets on a device are read once where it is not given, and that waits for it."""
    if longest is not None:
        return min(longest, total)
    return total if len(segments) < 3 else int(segments.diff().max())


def plan(
    segments: Tensor, budgets: Tensor, total: int, device: torch.device, width: int | None, longest: int | None
) -> tuple[Tensor, Tensor, int, int]:
    """What a choice of `total` rows on a GPU starts from: offsets, rows to choose of each pool, `width`, `longest`."""
    longest, width = longest_pool(segments, total, longest), output_width(budgets, width)
    segments = on(segments, device)
    return segments, torch.minimum(on(budgets, device), segments.diff()), width, longest


def empty_order(budgets: Tensor, device: torch.device, width: int | None = None) -> Tensor:
    """`[S, width]` int64, filled with the padding -1."""
    return torch.full((len(budgets), output_width(budgets, width)), -1, dtype=torch.int64, device=device)


def finite(scores: Tensor) -> Tensor:
    """Float32 scores that stay above the minus infinity of rows already chosen: NaN and -inf become the lowest."""
    return torch.nan_to_num(scores.float(), nan=LOWEST, neginf=LOWEST, posinf=torch.finfo(torch.float32).max)


def self_cosine(length: Tensor, eps: float = 1e-6) -> Tensor:
    """Cosine of each row with itself, from its length: 1 without rounding, 0 for rows that are zero or not finite."""
    return torch.where(torch.isfinite(length), (length / eps).clamp_max(1), 0.0).square()


def unit_rows(rows: Tensor, eps: float = 1e-6) -> Tensor:
    """Rows of length 1 in float32 along the last dimension; rows that are zero or not finite become zero."""
    rows = rows.float()
    unit = rows / rows.norm(dim=-1, keepdim=True).clamp_min(eps)
    return torch.nan_to_num(unit, nan=0.0, posinf=0.0, neginf=0.0)
