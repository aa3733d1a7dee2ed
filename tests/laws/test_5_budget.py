# SPDX-License-Identifier: Apache-2.0
"""Law 5: the kept count is exactly the budget; two runs keep the same set; the global random state is unchanged."""

import pytest
import torch
from families import FAMILIES, Image
from support import CLIP, MIXED, ONE, model_of, pruned

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
        images = first.places.image.split(first.places.counts)
        for visual, kept, image in zip(first.visual, first.kept, images, strict=True):
            n = len(visual)
            assert torch.equal(kept, kept.sort().values) and bool(torch.isin(kept, visual).all())
            if "ratio" in budget:
                pools = [n] if patch.method.group == "sample" else torch.unique(image, return_counts=True)[1].tolist()
                assert len(kept) == sum(max(1, round(budget["ratio"] * size)) for size in pools if size)
            if "keep" in budget:
                assert len(kept) == min(3, n)
        if "mean_ratio" in budget:
            # An integer count is off by less than one token of the smallest sample.
            assert abs(first.mean_ratio - 0.85) < 1.5 / min(len(v) for v in first.visual if len(v))


def test_the_three_budgets_mean_the_same(method: str) -> None:
    """`ratio`, the equivalent `keep` and the equivalent `mean_ratio` keep the same tokens at every cut."""
    model, batch = model_of("llava"), FAMILIES["llava"].batch(ONE)
    with pruned(model, method, ratio=0.4) as (patch, _):
        expected = patch.mean_ratio
        model(**batch)
        want = patch.last
    assert len(want.visual[0]) == 25 and len(want.kept[0]) == 10
    assert want.mean_ratio == pytest.approx(expected, abs=0.5 / 25)
    for budget in ({"keep": 10}, {"mean_ratio": expected}):
        with pruned(model, method, **budget) as (patch, _):
            model(**batch)
            got = patch.last
        assert [(layer, kept[0].tolist()) for layer, kept in got.stages] == [
            (layer, kept[0].tolist()) for layer, kept in want.stages
        ]


def test_fewer_tokens_than_pictures_where_the_last_token_is_one_of_them(method: str) -> None:
    """`generate` reads the output of the last token, so it stays, within the budget."""
    model, batch = model_of("llava"), FAMILIES["llava"].batch([[Image(0), 2, Image(1), 2, Image(0)]])
    for keep in (1, 2, 4):
        with pruned(model, method, keep=keep) as (patch, _):
            model(**batch)
        assert len(patch.last.kept[0]) == keep and patch.last.kept[0][-1] == patch.last.visual[0][-1]


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
