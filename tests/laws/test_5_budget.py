# SPDX-License-Identifier: Apache-2.0
"""Law 5: the kept count is exactly the budget; two runs keep the same set; the global generator is left alone."""

import pytest
import torch
from families import FAMILIES
from support import CLIP, MIXED, model_of, pruned

import vtprune


@pytest.mark.parametrize("budget", [{"ratio": 0.1}, {"ratio": 0.5}, {"keep": 3}, {"mean_ratio": 0.85}], ids=str)
def test_exact_and_repeatable(family: str, method: str, budget: dict) -> None:
    model, batch = model_of(family), FAMILIES[family].batch(MIXED)
    with pruned(model, method, **budget) as (patch, _):
        state = torch.random.get_rng_state()
        model(**batch)
        assert torch.equal(torch.random.get_rng_state(), state), "the method drew from the global generator"
        first = patch.last
        model(**batch)
        assert [k.tolist() for k in patch.last.kept] == [k.tolist() for k in first.kept]
        for visual, kept in zip(first.visual, first.kept, strict=True):
            n = len(visual)
            assert torch.equal(kept, kept.sort().values) and bool(torch.isin(kept, visual).all())
            if "ratio" in budget and patch.method.pool == "sample":
                assert len(kept) == (max(1, round(budget["ratio"] * n)) if n else 0)
            if "keep" in budget:
                assert len(kept) == min(3, n)
        if "mean_ratio" in budget:
            # One token of the smallest sample is the finest that a count can do.
            assert abs(first.mean_ratio - 0.85) < 1.5 / min(len(v) for v in first.visual if len(v))


def test_video(family: str, method: str) -> None:
    if FAMILIES[family].video is None:
        pytest.skip("this family takes no video")
    model, batch = model_of(family), FAMILIES[family].batch(CLIP)
    with pruned(model, method, keep=5) as (patch, _):
        model(**batch)
        assert [len(k) for k in patch.last.kept] == [5, 5]


@pytest.mark.parametrize(
    "bad",
    [
        {},
        {"ratio": 0},
        {"ratio": 1.5},
        {"ratio": -0.1},
        {"ratio": "many"},
        {"ratio": True},
        {"keep": 0},
        {"keep": 2.5},
        {"mean_ratio": 0.0},
        {"ratio": 0.1, "keep": 3},
        {"ratio": float("nan")},
    ],
    ids=str,
)
def test_bad_budgets(bad: dict) -> None:
    model = model_of("llava")
    with pytest.raises(vtprune.BudgetError, match="ratio|keep"):
        vtprune.patch(model, **bad)
    assert not model.model._forward_pre_hooks


def test_mean_ratio_that_cannot_be_met() -> None:
    with pytest.raises(vtprune.BudgetError, match="before layer 2 of 4"):
        vtprune.patch(model_of("llava"), mean_ratio=0.5, method=vtprune.methods.IWP(layer=2))
