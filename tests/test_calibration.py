# SPDX-License-Identifier: Apache-2.0
"""Fitting the curve of `Debiased` to scores collected from the built-in model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import vtprune
from vtprune import methods, refvlm
from vtprune.methods.debiased.padding import PaddingRule
from vtprune.methods.debiased.position_curve import Curve
from vtprune.study import calibration
from vtprune.study.calibration import collect

N = refvlm.VISUAL_TOKENS


@pytest.fixture(scope="module")
def model_and_batches() -> tuple[Any, list[dict[str, Any]]]:
    """Four prompts: one alone, two of different lengths in a padded batch, one alone."""
    model, processor = refvlm.load()
    pictures = [refvlm.scenes.scene(number).image for number in range(4)]
    texts = [refvlm.prompt(text) for text in ("how many stars?", "what is left of the big red circle?", "why?", "x?")]
    parts = [slice(0, 1), slice(1, 3), slice(3, 4)]
    batches = [
        dict(processor(images=pictures[part], text=texts[part], return_tensors="pt", padding=True)) for part in parts
    ]
    return model, batches


def own_scores(model: Any, batches: list[dict[str, Any]], host: methods.Method) -> list[torch.Tensor]:
    """Scores at the host's first cut when the host itself prunes."""
    found: list[torch.Tensor] = []
    with torch.no_grad(), vtprune.patch(model, ratio=0.1, method=host) as patch:
        for batch in batches:
            model(**batch)
            found += patch.last.scores[0].split([len(columns) for columns in patch.last.visual])
    return found


@pytest.mark.parametrize("host", [methods.FastV(), methods.PyramidDrop(), methods.TransPrune()], ids=lambda h: h.name)
def test_the_hosts_own_first_scores_are_collected(model_and_batches: Any, host: methods.ScoreMethod) -> None:
    scores, shown = collect(host, None, *model_and_batches)
    assert [len(s) for s in scores] == [N] * 4 and all(mask.all() for mask in shown)
    for mine, theirs in zip(scores, own_scores(*model_and_batches, host), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert vtprune.engine.patching.find_patch(model_and_batches[0]) is None


@pytest.mark.parametrize("form", ["exponential", "reciprocal-cubic"])
def test_fit_is_the_least_squares_curve_of_the_mean(model_and_batches: Any, form: Any, tmp_path: Path) -> None:
    method = methods.Debiased(methods.FastV(), curve="flat")
    curve = calibration.fit(method, *model_and_batches, form=form, path=tmp_path / "curve.json")
    assert curve.form == form and Curve.load(tmp_path / "curve.json") == curve
    assert set(json.loads((tmp_path / "curve.json").read_text())) == {"form", "coefficients"}

    scores = own_scores(*model_and_batches, methods.FastV())
    mean = torch.stack([score / score.mean() for score in scores]).mean(0).double()
    x = torch.arange(N).double() / (N - 1)

    def error(candidate: Curve) -> float:
        rising = 1 / candidate(x)
        scale = (mean @ rising) / (rising @ rising)
        return float((mean - scale * rising).square().sum())

    best = error(curve)
    for number in range(len(curve.coefficients)):
        for step in (-1e-2, 1e-2):
            moved = list(curve.coefficients)
            moved[number] += step
            assert error(Curve(form, tuple(moved))) > best


def test_the_method_uses_the_curve_that_it_fitted(model_and_batches: Any) -> None:
    model, batches = model_and_batches
    method = methods.Debiased(methods.FastV())
    before = method._curve
    curve = calibration.fit(method, model, batches)
    assert method._curve == method.curve == curve != before
    with torch.no_grad(), vtprune.patch(model, ratio=0.1, method=method) as patch:
        model(**batches[0])
    weights = curve(torch.arange(N) / (N - 1))
    torch.testing.assert_close(patch.last.scores[0], own_scores(model, batches[:1], methods.FastV())[0] * weights)


def test_padding_is_left_out_of_the_fit(model_and_batches: Any) -> None:
    sizes = [[(60, 120)], [(120, 60), (100, 100)], [(60, 120)]]
    scores, shown = collect(methods.FastV(), PaddingRule(), *model_and_batches, sizes)
    assert [int(mask.sum()) for mask in shown] == [N // 2, N // 2, N, N // 2]
    assert (
        shown[0].view(12, 12).all(1).tolist()
        == shown[1].view(12, 12).all(0).tolist()
        == [3 <= i < 9 for i in range(12)]
    )
    assert (
        calibration.fit(methods.Debiased(), *model_and_batches, sizes=sizes)
        == Curve.fit(scores, shown)
        != Curve.fit(scores)
    )
    assert calibration.fit(methods.Debiased(padding=False), *model_and_batches, sizes=sizes) == Curve.fit(scores)
    with pytest.raises(vtprune.MethodError, match="sizes has 1 entries, the call 2 pictures"):
        collect(methods.FastV(), PaddingRule(), *model_and_batches, [sizes[0]] * 3)


def test_padding_goes_first_in_every_beam(model_and_batches: Any) -> None:
    """Every beam drops padding first; sizes are passed to the method because the model's call takes none."""
    model, batches = model_and_batches
    method = methods.Debiased(sizes=[(60, 120), (120, 60)])
    with vtprune.patch(model, ratio=0.4, method=method) as patch:
        model.generate(**batches[1], num_beams=3, max_new_tokens=2)
    rows = [(kept - visual[0]) // 12 for visual, kept in zip(patch.last.visual, patch.last.kept, strict=True)]
    columns = [(kept - visual[0]) % 12 for visual, kept in zip(patch.last.visual, patch.last.kept, strict=True)]
    assert len(rows) == 6 and all(len(kept) == 58 for kept in patch.last.kept)
    assert all(3 <= int(r.min()) <= int(r.max()) < 9 for r in rows[:3])
    assert all(3 <= int(c.min()) <= int(c.max()) < 9 for c in columns[3:])


def test_what_cannot_be_calibrated_is_refused(model_and_batches: Any) -> None:
    model, batches = model_and_batches
    with vtprune.patch(model, ratio=0.5), pytest.raises(vtprune.VTPruneError, match="remove the patch"):
        calibration.fit(methods.Debiased(), model, batches)
    words = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    with pytest.raises(vtprune.MethodError, match="no prompt has a visual token"):
        calibration.fit(methods.Debiased(), model, [words])
    with pytest.raises(vtprune.MethodError, match="expected a method with a curve"):
        calibration.fit(methods.FastV(), model, batches)  # type: ignore[arg-type]
    with pytest.raises(vtprune.MethodError, match="form is 'linear'; expected .*'log-linear'"):
        Curve.fit([torch.ones(20)], form="linear")  # type: ignore[arg-type]
    with pytest.raises(vtprune.MethodError, match="not finite"):
        Curve.fit([torch.zeros(20)])
