# SPDX-License-Identifier: Apache-2.0
"""Attention debiasing: curves, padding, and the wrapper around other methods."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from ragged_prompts import BUDGETS, RAGGED, sample, tokens
from torch import Tensor

from vtprune import methods
from vtprune.errors import MethodError
from vtprune.methods.debiased.padding import PaddingRule, shown
from vtprune.methods.debiased.position_curve import Curve


def test_curves_fall_from_one() -> None:
    x = torch.linspace(0, 1, 576, dtype=torch.float64)
    for name in ("fastv", "pyramiddrop/gqa", "sparsevlm/pope", "himap/vqav2", "tokencarve/mmb_cn"):
        weights = Curve.preset(name)(x)
        assert weights[0] == 1 and (weights.diff() < 0).all() and weights[-1] > 0
    i = torch.arange(576, dtype=torch.float64)
    cubic = 1 + 3.01519760e-3 * i - 1.45979083e-5 * i**2 + 2.56911352e-8 * i**3
    torch.testing.assert_close(Curve.preset("fastv")(i / 575), 1 / cubic)
    assert Curve.preset("sparsevlm/pope").coefficients == (2.666,)


def collected(form: str, noise: float) -> tuple[list[Tensor], list[Tensor]]:
    g = torch.Generator().manual_seed(0)
    scores, masks = [], []
    for length in (80, 80, 120, 80):
        x = torch.arange(length).double() / (length - 1)
        bias = torch.exp(1.3 * x) if form == "exponential" else 1 + 0.8 * x - 0.5 * x**2 + 1.5 * x**3
        mask = torch.ones(length, dtype=torch.bool) if noise == 0 else torch.rand(length, generator=g) < 0.8
        score = 3 * bias * (1 + noise * torch.randn(length, generator=g).double())
        scores.append(torch.where(mask, score, 1e3))  # scores of padding must not matter
        masks.append(mask)
    return scores, masks


@pytest.mark.parametrize("form", ["exponential", "reciprocal-cubic"])
def test_fit_finds_the_curve_again(form: str) -> None:
    scores, masks = collected(form, 0.0)
    same_length = [scores[0], scores[1], scores[3]]
    curve = Curve.fit(same_length, form=form)  # type: ignore[arg-type]
    expected = (1.3,) if form == "exponential" else (0.8, -0.5, 1.5)
    assert curve.coefficients == pytest.approx(expected, abs=1e-6)
    x = torch.linspace(0, 1, 50)
    noisy, masks = collected(form, 0.02)
    fitted = Curve.fit(noisy, masks, form=form)  # type: ignore[arg-type]
    torch.testing.assert_close(fitted(x), Curve(form, expected)(x), atol=0.05, rtol=0.0)  # type: ignore[arg-type]


def test_a_line_through_logarithms_does_not_follow_a_few_last_places() -> None:
    x = torch.linspace(0, 1, 100, dtype=torch.float64)
    assert Curve.fit([torch.exp(1.3 * x)], form="log-linear").coefficients == pytest.approx((1.3,))
    steep = torch.where(x > 0.97, 50.0, torch.exp(1.3 * x))  # as the last tokens of a prompt
    sigma, wild = (Curve.fit([steep], form=form).coefficients[0] for form in ("log-linear", "exponential"))
    assert 1.3 < sigma < 2.5 and wild > 2 * sigma
    assert Curve.fit([steep], form="log-linear").form == "exponential"


def test_every_sample_counts_the_same_in_a_fit() -> None:
    g = torch.Generator().manual_seed(1)
    flat, steep = torch.rand(40, generator=g) + 1, torch.exp(2 * torch.linspace(0, 1, 40))
    fitted, scaled = Curve.fit([flat, steep]), Curve.fit([flat, 100 * steep])
    assert fitted.coefficients == pytest.approx(scaled.coefficients, abs=1e-6)


def test_fit_is_a_least_squares_minimum() -> None:
    g = torch.Generator().manual_seed(3)
    x = torch.linspace(0, 1, 60, dtype=torch.float64)
    score = (0.5 + x + torch.rand(60, generator=g)).double()  # no exponential at all
    sigma = Curve.fit([score]).coefficients[0]

    def loss(s: float) -> float:
        e, y = torch.exp(s * x), score / score.mean()
        return float((y - (y @ e) / (e @ e) * e).square().sum())

    assert loss(sigma) < min(loss(sigma - 1e-3), loss(sigma + 1e-3))


def test_curve_survives_saving(tmp_path: Path) -> None:
    curve = Curve("reciprocal-cubic", (0.1, 0.2, 0.3))
    curve.save(tmp_path / "curve.json")
    assert Curve.load(tmp_path / "curve.json") == curve
    for form, coefficients in (("exponential", [-500]), ("exponential", [500]), ("reciprocal-cubic", [-2, 0, 0])):
        (tmp_path / "bad.json").write_text(json.dumps({"form": form, "coefficients": coefficients}))
        with pytest.raises(MethodError, match="not all positive and finite"):
            Curve.load(tmp_path / "bad.json")
    assert methods.Debiased(curve=str(tmp_path / "curve.json"))._curve == curve


def test_padding_bands() -> None:
    half, strict = PaddingRule("area", 0.5), PaddingRule("area", 0.01)
    # 24 x 15 in a square of 24: 4.5 cells of padding on both sides, so one cell is exactly half padding and is kept.
    assert half.band(15, 24, 24).sum() == 16 and strict.band(15, 24, 24).sum() == 14
    assert PaddingRule("integer").band(15, 24, 24).tolist() == [4 <= c < 19 for c in range(24)]
    assert PaddingRule("bilinear").band(120, 240, 24).tolist() == [6 <= c < 18 for c in range(24)]
    wide = half.grid(height=100, width=200, cells=8)
    assert wide.all(1).tolist() == [False, False, True, True, True, True, False, False]
    assert torch.equal(half.grid(height=200, width=100, cells=8), wide.T)


def test_padding_is_suppressed_only_where_a_square_grid_shows_another_shape() -> None:
    batch = tokens([sample(1, 0, 8, 8, 2), sample(2, 0, 4, 8, 2), sample(3, 0, 8, 8, 2)], [4, 4, 4])
    assert shown(batch, PaddingRule()).all()
    batch.inputs = {"image_sizes": torch.tensor([[100, 200], [100, 200], [300, 300]])}
    visible = shown(batch, PaddingRule()).split([64, 32, 64])
    assert visible[0].view(8, 8).all(1).tolist() == [False, False, True, True, True, True, False, False]
    assert visible[1].all() and visible[2].all()
    keep = methods.Debiased().choose(batch).keep[:64].view(8, 8)
    assert not keep[[0, 1, 6, 7]].any()
    batch.memory.clear()
    batch.crop = batch.crop + 1
    assert shown(batch, PaddingRule()).all()


def test_pictures_that_the_attention_mask_hides_have_sizes_too() -> None:
    """The second and the third of four pictures are hidden, so that they have no tokens."""
    batch = tokens([sample(1, 0, 8, 8, 2), sample(2, 0, 8, 8, 2)], [4, 4])
    last = batch.image == 1
    batch.image, batch.feature = batch.image + 2 * last, batch.feature + 2 * 64 * last
    batch.inputs = {"image_sizes": torch.tensor([[300, 300], [300, 300], [300, 300], [100, 200]])}
    visible = shown(batch, PaddingRule()).split(64)
    assert visible[0].all() and visible[1].view(8, 8).all(1).tolist() == [2 <= row < 6 for row in range(8)]


@pytest.mark.parametrize("host", [methods.FastV(), methods.PyramidDrop(), methods.TransPrune()], ids=lambda h: h.name)
def test_scores_are_the_weighted_scores_of_the_host(host: methods.ScoreMethod) -> None:
    curve = Curve("exponential", (2.0,))
    scores = methods.Debiased(host, curve=curve).choose(tokens(RAGGED, BUDGETS)).scores
    batch = tokens(RAGGED, BUDGETS)
    x = batch.index / (batch.originals[batch.sample] - 1)
    torch.testing.assert_close(scores, host.choose(batch).scores * torch.exp(-2 * x))
    assert methods.Debiased(host, curve=curve).schedule(32) == host.schedule(32)


def test_later_stages_count_original_tokens() -> None:
    method = methods.Debiased(methods.PyramidDrop(), curve=Curve("exponential", (2.0,)), stages="all")
    batch = tokens(RAGGED, BUDGETS)
    method.choose(batch)
    later = tokens([sample(7, 0, 1, 5, 2)], [3], stage=1)
    later.originals, later.index, later.memory = torch.tensor([20]), torch.tensor([0, 4, 7, 13, 19]), batch.memory
    raw = methods.PyramidDrop().choose(later).scores
    torch.testing.assert_close(method.choose(later).scores, raw * torch.exp(-2 * later.index / 19))
    method.stages = "first"
    assert torch.equal(method.choose(later).scores, raw)


def test_padding_comes_back_only_through_raw_recycling() -> None:
    s = sample(11, 0, 12, 12, 4)
    sizes = {"image_sizes": torch.tensor([[30, 120]])}

    def kept_padding(recycle: str) -> int:
        batch = tokens([s], [20])
        batch.inputs = sizes
        keep = methods.Debiased(methods.SparseVLM(), recycle=recycle).choose(batch).keep  # type: ignore[arg-type]
        return int((keep & ~shown(batch, PaddingRule("bilinear"))).sum())

    assert kept_padding("raw") > 0
    batch = tokens([s], [20])
    batch.inputs = sizes
    method = methods.Debiased(methods.SparseVLM())
    scores = method.score(batch)
    assert (scores[~shown(batch, PaddingRule("bilinear"))] == 0).all()
    assert kept_padding("debiased") < kept_padding("raw")


def test_unknown_curves_and_hosts_are_named() -> None:
    with pytest.raises(MethodError, match="no released curve 'fastv/gqa'"):
        methods.Debiased(curve="fastv/gqa")
    with pytest.raises(MethodError, match="then fit one to pictures of your own"):
        methods.Debiased(methods.TransPrune())
    with pytest.raises(MethodError, match="expected an instance of ScoreMethod"):
        methods.Debiased(methods.DART())  # type: ignore[arg-type]
    with pytest.raises(MethodError, match="2 coefficients; expected 1"):
        Curve("exponential", (1.0, 2.0))
    with pytest.raises(MethodError, match="at least 4"):
        Curve.fit([torch.ones(3)])
