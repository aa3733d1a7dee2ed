# SPDX-License-Identifier: Apache-2.0
"""`scope` and `resprune`, on hand-made tokens and on models with and without a class token."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES
from support import ONE, model_of, pruned
from test_methods_vision import tokens_of

import vtprune
from vtprune import methods
from vtprune.errors import MethodError
from vtprune.methods.resprune import centered
from vtprune.vision.attention import has_class_token

PLAIN = {"scope": methods.Scope(alpha=0), "resprune": methods.ResPrune()}
both = pytest.mark.parametrize("name", PLAIN)


@both
def test_newlines_go_first_however_long_they_are(name: str) -> None:
    tokens = tokens_of([(4, 6)], [24], newlines=True)
    newline = tokens.grid_row < 0
    tokens.hidden[newline] *= 100
    assert torch.equal(PLAIN[name].choose(tokens).keep, ~newline)
    tokens.grid_row[:] = -1  # without grid positions any token may be kept
    tokens.budgets[:] = 1
    assert int((PLAIN[name].choose(tokens).keep & newline).sum()) == (name == "resprune")


def test_length_counts_for_resprune_unless_rows_are_unit() -> None:
    tokens = tokens_of([(5, 5)], [1])
    tokens.hidden[17] *= 30
    assert methods.ResPrune().choose(tokens).keep.nonzero().item() == 17
    tokens.hidden[3] *= 1e4
    assert methods.ResPrune().choose(tokens).keep.nonzero().item() == 3
    assert methods.ResPrune(unit=True).choose(tokens).keep.nonzero().item() == 0, "the first of equal lengths"
    tokens.budgets[:] = 12
    chosen = methods.ResPrune(unit=True).choose(tokens).keep
    tokens.hidden *= torch.linspace(0.1, 7, 25)[:, None]
    assert torch.equal(methods.ResPrune(unit=True).choose(tokens).keep, chosen)


def test_resprune_cuts_deep_decoders_after_their_first_layer() -> None:
    layers = [methods.ResPrune().schedule(depth)[0].layer for depth in (1, 6, 15, 16, 32)]
    assert layers == [0, 0, 0, 1, 1]
    assert [methods.ResPrune(layer=3).schedule(depth)[0].layer for depth in (2, 32)] == [1, 3]
    assert methods.ResPrune(layer=0).schedule(32)[0].layer == 0
    with pytest.raises(MethodError, match="layer is -1"):
        methods.ResPrune(layer=-1)


def test_center_takes_the_mean_of_each_pool_out() -> None:
    rows, group = torch.randn(9, 4), torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1])
    rows[6] = 0  # a token without a grid position
    got = centered(rows, group, 2)
    torch.testing.assert_close(got[:4], rows[:4] - rows[:4].mean(0))
    shown = [4, 5, 7, 8]
    torch.testing.assert_close(got[shown], rows[shown] - rows[shown].mean(0))
    assert (got[6] == 0).all()
    tokens = tokens_of([(5, 5)], [1])
    tokens.hidden[:, 0] -= 50  # a common component that dominates all others
    plain = tokens_of([(5, 5)], [1])
    center = methods.ResPrune(center=True)
    assert torch.equal(center.choose(tokens).keep, center.choose(plain).keep)
    assert not torch.equal(methods.ResPrune().choose(tokens).keep, methods.ResPrune().choose(plain).keep)


@pytest.mark.parametrize("family, by_class", [("llava", True), ("qwen2_5_vl", False), ("internvl", True)])
@torch.no_grad()
def test_saliency_is_attention_among_patches(family: str, by_class: bool) -> None:
    """The saliency of a picture sums to 1 with a class token, and to the number of patches without one."""
    model, batch = model_of(family), FAMILIES[family].batch(ONE)
    with pruned(model, methods.Scope(), ratio=0.3) as (patch, spy):
        model(**batch)
    tokens, choice = spy.choices[0]
    assert has_class_token(tokens.anatomy) == by_class
    assert choice.scores is not None and (choice.scores > 0).all()
    if family == "llava":
        assert float(choice.scores.sum()) == pytest.approx(1, abs=1e-5)
    if family == "qwen2_5_vl":
        assert float(choice.scores.sum()) == pytest.approx(len(batch["pixel_values"]), rel=1e-5)


@torch.no_grad()
def test_coverage_alone_reads_nothing_of_the_tower() -> None:
    model = model_of("llava")
    anatomy = vtprune.inspect(model)
    assert methods.Scope(alpha=0).taps(anatomy) == () and len(tuple(methods.Scope().taps(anatomy))) == 2


def test_exponents_are_checked() -> None:
    for alpha in (-1, float("nan"), float("inf")):
        with pytest.raises(MethodError, match="Scope.*alpha.*; expected"):
            methods.Scope(alpha=alpha)
    with pytest.raises(MethodError, match="combine|mean"):
        methods.Scope(combine="mean")  # type: ignore[arg-type]
