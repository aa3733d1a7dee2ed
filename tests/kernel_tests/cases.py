# SPDX-License-Identifier: Apache-2.0
"""Inputs for the kernel tests: ragged groups of odd sizes, clustered like real features."""

from __future__ import annotations

import torch
from torch import Tensor

LENGTHS = [(1,), (5,), (123,), (577,), (5, 0, 123, 1, 31)]


def offsets_of(lengths: tuple[int, ...]) -> Tensor:
    """`[S + 1]` int64 from the lengths of the groups."""
    return torch.tensor([0, *lengths]).cumsum(0)


def budgets(lengths: tuple[int, ...], kind: str) -> Tensor:
    """Budget per group: one row, some rows or all rows."""
    count = {"one": lambda n: min(n, 1), "some": lambda n: (n + 3) // 4, "all": lambda n: n}[kind]
    return torch.tensor([count(n) for n in lengths])


def clustered(rows: int, *shape: int, seed: int, clusters: int = 12, noise: float = 0.7) -> Tensor:
    """Clustered rows `[rows, *shape]` float32; rows of one cluster are adjacent."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(clusters, *shape, generator=generator)
    which = torch.randint(clusters, (rows,), generator=generator).sort().values
    return centers[which] + noise * torch.randn(rows, *shape, generator=generator)


def exact_rows(rows: int, width: int, seed: int) -> Tensor:
    """Rows `[rows, width]` with four entries of 1 or -1: norms and products are exact, and so are ties."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.rand(rows, width, generator=generator).topk(4, dim=1).indices
    signs = torch.randint(0, 2, (rows, 4), generator=generator) * 2.0 - 1
    return torch.zeros(rows, width).scatter_(1, places, signs)


def strided(tensor: Tensor) -> Tensor:
    """The same values as a non-contiguous tensor: every second row of a longer one."""
    return torch.stack([tensor, torch.full_like(tensor, 7)], 1).flatten(0, 1)[::2]


def assert_order(order: Tensor, expected: Tensor, offsets: Tensor, counts: Tensor) -> None:
    """Asserts equal orders, each with exactly `counts` distinct rows of its own group."""
    assert order.dtype == torch.int64 and order.shape == (len(counts), int(counts.max()))
    for row, start, stop, count in zip(order, offsets[:-1], offsets[1:], counts.tolist(), strict=True):
        chosen = row[:count]
        assert len(chosen.unique()) == count
        assert ((chosen >= start) & (chosen < stop)).all()
        assert (row[count:] == -1).all()
    assert torch.equal(order, expected)
