# SPDX-License-Identifier: Apache-2.0
"""Selections do not wait for the device to read values that the host already knows."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, Image
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import vtprune
from vtprune.core.ragged import from_order, group_ids, rank_in_group, top_k
from vtprune.methods.transprune import combine, variation
from vtprune.methods.zoo_prune.method import scaled
from vtprune_kernels import _ragged

SEGMENTS, SCORES = torch.tensor([0, 4, 4, 9]), torch.tensor([3.0, 1, 2, 2, 5, 5, 9, 0, 1])
ORDER = torch.tensor([[2, 0, -1], [-1, -1, -1], [8, 4, 6]])
CALLS = {
    "group_ids": lambda offsets, scores, order: group_ids(offsets, len(scores)),
    "rank_in_group": lambda offsets, scores, order: rank_in_group(scores, offsets),
    "top_k": lambda offsets, scores, order: top_k(scores, offsets, torch.tensor([2, 0, 3])),
    "from_order": lambda offsets, scores, order: from_order(order, len(scores)),
    "scaled": lambda offsets, scores, order: scaled(scores, offsets),
    "combine": lambda offsets, scores, order: combine(scores, scores, offsets),
    "variation": lambda offsets, scores, order: variation(torch.stack([scores, scores], -1), offsets),
}
RESULTS = {
    "group_ids": [0, 0, 0, 0, 2, 2, 2, 2, 2],
    "rank_in_group": [0, 3, 1, 2, 1, 2, 0, 4, 3],
    "top_k": [True, False, True, False, True, True, True, False, False],
    "from_order": [True, False, True, False, True, False, True, False, True],
}


@pytest.mark.parametrize("name", CALLS)
def test_shapes_follow_from_shapes(name: str) -> None:
    """Output shapes follow from input shapes: fake tensors, which have no values to read, are accepted."""
    result = CALLS[name](SEGMENTS, SCORES, ORDER)
    if name in RESULTS:
        assert result.tolist() == RESULTS[name]
    mode = FakeTensorMode()
    with mode:
        fake = CALLS[name](*(mode.from_tensor(x) for x in (SEGMENTS, SCORES, ORDER)))
    assert fake.shape == result.shape and fake.dtype == result.dtype


@pytest.mark.parametrize("method", ["iwp", "divprune", "cdpruner", "zoo_prune"])
def test_the_largest_budget_is_not_read(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    known, original = [], _ragged.output_columns

    def output_columns(budgets: Tensor, max_budget: int | None) -> int:
        known.append(max_budget is not None and max_budget == int(budgets.max()))
        return original(budgets, max_budget)

    monkeypatch.setattr(_ragged, "output_columns", output_columns)
    family = FAMILIES["llava"]
    model, batch = family.build(), family.batch([[3, Image(0), 5], [Image(1), Image(2), 7]])
    with torch.no_grad(), vtprune.patch(model, ratio=0.3, method=method):
        model(**batch)
    assert known and all(known)
