# SPDX-License-Identifier: Apache-2.0
"""`vtprune tune --auto` and `vtprune certify`: output, errors, and use of the files that they write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from PIL import Image
from support import MIXED, model_of
from test_cli import _refused, _run, photo  # noqa: F401

import vtprune
from vtprune import refvlm
from vtprune.errors import BudgetError, VTPruneError
from vtprune.integrations.vllm.settings import parse
from vtprune.study.auto import calibrate, shares


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("scenes")
    for number in range(4):
        refvlm.scenes.scene(number).image.save(path / f"{number}.png")
    return path


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5])
@torch.no_grad()
def test_the_energy_meets_the_mean_from_below(ratio: float) -> None:
    model, batches = model_of("llava"), [FAMILIES["llava"].batch(MIXED)] * 2
    auto, kept = calibrate(model, batches, ratio, 0.0, 1.0)
    assert len(kept) == 6 and sum(kept) / 6 <= ratio + 1e-9
    with vtprune.patch(model, ratio=auto, method="uniform") as patch:
        model(**batches[0])
        got = [len(k) for k in patch.last.kept if len(k)]
        sizes = [len(v) for v in patch.last.visual if len(v)]
    assert sum(got) == pytest.approx(sum(k * s for k, s in zip(kept[:3], [25] * 3, strict=True)), abs=1e-6)
    assert sum(sizes) == 75
    more = vtprune.Auto(min(1 - 1e-7, auto.energy + 0.02), 0.0, 1.0)
    with vtprune.patch(model, ratio=more, method="uniform") as patch:
        model(**batches[0])
        assert sum(len(k) for k in patch.last.kept) > sum(got)


def test_shares_are_those_of_the_counts() -> None:
    features = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    from vtprune.core.energy import energy_left

    offsets = torch.tensor([0, 15, 40])
    for auto in (vtprune.Auto(0.5, 0.0, 1.0), vtprune.Auto(0.9, 0.1, 0.2), vtprune.Auto(0.99, 0.4, 1.0)):
        counts = auto.counts(features, offsets)
        expected = [counts[0] / 15, counts[1] / 25]
        assert shares(energy_left(features, offsets, auto.max), [15, 25], auto) == expected


def test_a_mean_out_of_bounds_and_a_patched_model_are_refused() -> None:
    model, batches = model_of("llava"), [FAMILIES["llava"].batch(MIXED)]
    with pytest.raises(BudgetError, match="expected a number from 0.02 to 0.5"):
        calibrate(model, batches, 0.6)
    with pytest.raises(VTPruneError, match="no prompt has a visual token"):
        calibrate(model, [], 0.3)
    with vtprune.patch(model, ratio=0.5), pytest.raises(VTPruneError, match="remove the patch"):
        calibrate(model, batches, 0.3)


def test_tune_auto_writes_what_run_takes(capfd, tmp_path, pictures, photo) -> None:  # noqa: F811
    out = tmp_path / "auto.json"
    arguments = ["tune", "--auto", "--images", pictures, "--question", "how many stars?", "--mean-ratio", 0.2]
    assert _run(*arguments, "--out", out) == 0
    printed = capfd.readouterr().out
    data = json.loads(out.read_text())
    assert (
        data["about"]["pictures"] == 4
        and data["about"]["mean_ratio"] <= 0.2
        and f"energy {data['energy']:.6g}" in printed
    )
    assert "exists; use --force" in _refused(capfd, *arguments, "--out", out)
    demo = ["demo", "--small", "--image", photo, "--repeats", 1, "--output", tmp_path / "a.png", "--report"]
    assert _run(*demo, "--auto", out, "--method", "divprune") == 0
    assert "auto (energy" in capfd.readouterr().out
    assert _run(*demo, "--ratio", "auto") == 0
    assert "auto (energy 0.9" in capfd.readouterr().out
    assert "is no file of an automatic ratio" in _refused(capfd, *demo, "--auto", photo)


def test_tune_pixels_writes_what_vllm_takes(capfd, tmp_path, monkeypatch, pictures) -> None:
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "ratio.json"  # the default
    arguments = ["tune", "--pixels", "--images", pictures, "--mean-ratio", 0.2]
    assert _run(*arguments) == 0
    printed = capfd.readouterr().out
    auto = parse(json.loads(out.read_text())["vtprune"]).auto
    kept = [auto.ratio(Image.open(file)) for file in sorted(pictures.iterdir())]
    assert sum(kept) / 4 == pytest.approx(0.2, abs=1e-4) and f"from {min(kept):.3f} to {max(kept):.3f}" in printed
    assert "exists; use --force" in _refused(capfd, *arguments)
    assert "expected min <= mean" in _refused(capfd, *arguments, "--force", "--max", 0.1)
    assert "--question is missing" in _refused(capfd, "tune", "--auto", "--images", pictures)


def test_certify_writes_what_run_takes(capfd, tmp_path, photo) -> None:  # noqa: F811
    out = tmp_path / "certificate.json"
    arguments = ["certify", "--limit", 12, "--risk", 0.4, "--confidence", 0.8, "--ratios", 0.9, 0.5, "--out", out]
    assert _run(*arguments, "--method", "divprune") == 0
    printed = capfd.readouterr().out
    assert "certified: ratio 0.5 with divprune changes at most 0.4 of the answers" in printed
    found = vtprune.Certificate.load(out)
    assert found.ratio == 0.5 and found.pictures == 12 and found.method == "divprune"
    assert "exists; use --force" in _refused(capfd, *arguments)
    demo = ["demo", "--small", "--image", photo, "--repeats", 1, "--output", tmp_path / "a.png", "--report"]
    demo += ["--certificate", out]
    assert _run(*demo) == 0
    printed = capfd.readouterr().out
    assert "divprune" in printed and "ratio=0.5" in printed
    assert "certificate is for the method" in _refused(capfd, *demo, "--method", "iwp")
    few = ["certify", "--limit", 3, "--ratios", 0.9, "--out", tmp_path / "few.json"]
    assert _run(*few) == 0
    printed = capfd.readouterr().out
    assert "it would take 59 pictures" in printed and "no ratio below 1 is certified with 3 pictures" in printed
    assert "not a probability" in _refused(capfd, "certify", "--risk", 1)
