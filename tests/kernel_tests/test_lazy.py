# SPDX-License-Identifier: Apache-2.0
"""Largest values with ties to the smaller row, and their lazy evaluation."""

from __future__ import annotations

import pytest
import torch

from vtprune_kernels._lazy import lazy_top, top_set


def largest(values, count):
    return torch.sort(values, descending=True, stable=True).indices[:count].sort().values


@pytest.mark.parametrize("rows", [1, 2, 7, 64, 300])
@pytest.mark.parametrize("levels", [1, 2, 5, 10**6], ids=lambda n: f"{n} values")
def test_ties_go_to_the_smaller_row(rows, levels):
    generator = torch.Generator().manual_seed(rows)
    for seed in range(10):
        values = torch.randint(levels, (rows,), generator=generator).float()
        if seed % 3 == 0:
            values[torch.rand(rows, generator=generator) < 0.3] = -torch.inf
        for count in {1, 2, rows // 2 + 1, rows, rows + 3}:
            assert top_set(values, count).tolist() == largest(values, min(count, rows)).tolist()


@pytest.mark.parametrize("levels", [2, 5, 10**6], ids=lambda n: f"{n} values")
def test_lazy_evaluation_finds_the_exact_ones(levels):
    generator = torch.Generator().manual_seed(levels)
    for rows in (5, 64, 65, 500):
        exact = torch.randint(levels, (rows,), generator=generator).float()
        slack = torch.randint(3, (rows,), generator=generator).float()
        for count in (1, 4, 5):
            bounds, seen = exact + slack, torch.zeros(rows, dtype=torch.int64)
            evaluated = []

            def refresh(which, bounds=bounds, seen=seen, evaluated=evaluated, exact=exact):
                evaluated.extend(which.tolist())
                bounds[which], seen[which] = exact[which], 1

            found = lazy_top(bounds, seen, 1, count, refresh)
            assert found.tolist() == largest(exact, count).tolist()
            assert len(evaluated) == len(set(evaluated)), "a row was evaluated twice"
