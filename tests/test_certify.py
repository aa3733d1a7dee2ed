# SPDX-License-Identifier: Apache-2.0
"""Certified ratios: the statistics against known values, and certificates on a model."""

from __future__ import annotations

import copy
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from families import FAMILIES
from support import ONE, model_of

import vtprune
from vtprune import methods
from vtprune.errors import CertificateError, VTPruneError
from vtprune.study import certify as module
from vtprune.study.risk import binomial_cdf, exact_p_value, p_value, pictures_needed

# Smallest number of pictures certified per number of changes, at risk = level: (Hoeffding-Bentkus, exact test).
NEEDED = {
    0.05: {0: (59, 59), 1: (113, 93), 2: (150, 124), 3: (181, 153), 5: (240, 208)},
}
NEEDED_BENTKUS = {0.10: [29, 56, 74, 89, 118], 0.02: [149, 285, 379, 457, 605]}


def least(changes: int, value, risk: float, level: float) -> int:
    return next(n for n in range(changes + 1, 2000) if value(changes, n, risk) <= level)


def bentkus(changes: int, n: int, risk: float) -> float:
    return p_value(changes / n, n, risk)


def test_the_numbers_of_pictures_are_the_known_ones() -> None:
    for changes, (hb, exact) in NEEDED[0.05].items():
        assert least(changes, bentkus, 0.05, 0.05) == hb
        assert least(changes, exact_p_value, 0.05, 0.05) == exact
    for risk, numbers in NEEDED_BENTKUS.items():
        assert [least(changes, bentkus, risk, 0.05) for changes in (0, 1, 2, 3, 5)] == numbers
    assert max(k for k in range(20) if bentkus(k, 200, 0.05) <= 0.05) == 3
    assert max(k for k in range(20) if exact_p_value(k, 200, 0.05) <= 0.05) == 4


def test_the_binomial_tail_is_the_sum() -> None:
    for n, p in ((7, 0.3), (60, 0.05), (300, 0.02)):
        for k in (0, 1, n // 3, n - 1):
            total = math.fsum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k + 1))
            assert binomial_cdf(k, n, p) == pytest.approx(total, rel=1e-9)
        assert binomial_cdf(n, n, p) == 1 and binomial_cdf(-1, n, p) == 0


def test_p_values_are_honest() -> None:
    """Losses whose mean equals the limit are certified at most as often as the level allows."""
    draw = random.Random(0)
    for losses in ((0.0, 1.0), (0.0, 0.5, 1.0), (0.1,)):
        risk = 0.1
        passed = 0
        for _ in range(2000):
            if losses == (0.1,):
                mean = 0.1
            else:
                scale = risk / (sum(losses) / len(losses))
                mean = sum(draw.choice(losses) if draw.random() < scale else 0.0 for _ in range(80)) / 80
            passed += p_value(mean, 80, risk) <= 0.1
        assert passed / 2000 <= 0.1 + 2 * math.sqrt(0.1 * 0.9 / 2000)


def test_the_sequence_ends_at_the_first_failure() -> None:
    from benchmarks.certify import certified

    assert certified(np.arange(100) < np.array([[0], [1], [20], [0]]), 0.05, 0.95) == 1
    assert certified(np.arange(100) < np.array([[20], [0]]), 0.05, 0.95) is None


def test_pictures_needed_are_the_least() -> None:
    assert pictures_needed(0.0, 0.05, 0.05) == 59
    assert pictures_needed(0.05, 0.05, 0.05) is None and pictures_needed(0.2, 0.05, 0.05) is None
    n = pictures_needed(0.03, 0.05, 0.05)
    assert n is not None and p_value(0.03, n, 0.05) <= 0.05
    assert pictures_needed(0.0499999, 0.05, 0.05, most=1000) is None


@pytest.fixture(scope="module")
def prompts() -> list[dict]:
    family = FAMILIES["llava"]
    batches = [family.batch(ONE) for _ in range(6)]
    for number, batch in enumerate(batches):
        batch["pixel_values"] = torch.randn(
            batch["pixel_values"].shape, generator=torch.Generator().manual_seed(number)
        )
    return batches


def made(prompts, monkeypatch, changes: dict[float, int], **options) -> vtprune.Certificate:
    """A certificate where a known number of answers changes at each ratio."""
    monkeypatch.setattr(
        module,
        "_losses",
        lambda model, prompts, reference, method, candidate, length: (
            [1.0] * changes[candidate] + [0.0] * (len(prompts) - changes[candidate])
        ),
    )
    return vtprune.certify(model_of("llava"), prompts, candidates=tuple(changes), max_new_tokens=1, **options)


def test_the_smallest_ratio_before_the_first_failure_is_certified(prompts, monkeypatch) -> None:
    lines: list[str] = []
    many = prompts * 20  # 120
    found = made(many, monkeypatch, {0.8: 0, 0.5: 1, 0.3: 3, 0.2: 0}, log=lines.append)
    assert found.ratio == 0.5 and found.pictures == 120 and found.changed == pytest.approx(1 / 120)
    assert [row["candidate"] for row in found.tried] == ["0.8", "0.5", "0.3"]
    assert "certified" in lines[0] and "it would take" in lines[2] and "0.3" in lines[2]
    needed = int(lines[2].split("take ")[1].split(" ")[0].replace(",", ""))
    assert needed == pictures_needed(3 / 120, 0.05, 0.05)
    assert made(many, monkeypatch, {0.8: 20}, log=lines.append).ratio == 1.0
    assert "above the allowed 0.05" in lines[-1]


def test_questions_about_one_picture_are_one_observation(prompts, monkeypatch) -> None:
    many = prompts * 20
    names = [n // 2 for n in range(120)]  # 60 pictures: none may change
    assert made(many, monkeypatch, {0.5: 0}, pictures=names).ratio == 0.5
    found = made(many, monkeypatch, {0.5: 1}, pictures=names)
    assert found.ratio == 1.0 and found.pictures == 60 and found.questions == 120
    assert made(many, monkeypatch, {0.5: 1}).ratio == 0.5


def test_answers_are_really_compared(prompts) -> None:
    model = model_of("llava")
    everything = vtprune.certify(model, prompts, candidates=(1.0,), max_new_tokens=4, risk=0.5, confidence=0.9)
    assert everything.tried[0]["changed"] == 0 and everything.ratio == 1.0
    strong = vtprune.certify(model, prompts, candidates=(0.04,), method="random", max_new_tokens=8, risk=0.5)
    reference = [module.answer(model, p, 8) for p in prompts]
    with vtprune.patch(model, ratio=0.04, method="random"):
        differ = sum(module.answer(model, p, 8) != r for p, r in zip(prompts, reference, strict=True))
    assert strong.tried[0]["changed"] == differ / 6
    assert differ > 0


def test_a_certificate_is_taken_by_its_model_and_method_only(prompts, monkeypatch, tmp_path: Path) -> None:
    model = model_of("llava")
    found = made(prompts * 20, monkeypatch, {0.5: 0}, method=methods.FastV(layer=1))
    found.save(tmp_path / "c.json")
    back = vtprune.Certificate.load(tmp_path / "c.json")
    assert back == found
    for given in ({}, {"method": methods.FastV(layer=1)}):
        with vtprune.patch(model, ratio=back, **given) as patch:
            assert patch.budget.ratio == 0.5 and patch.method == methods.FastV(layer=1)
    for method in ("iwp", "fastv", methods.FastV(layer=3)):
        with pytest.raises(CertificateError, match=r"for the method FastV\(layer=1"):
            vtprune.patch(model, ratio=back, method=method)
    with pytest.raises(CertificateError, match="found a"):
        vtprune.patch(model_of("qwen2_5_vl"), ratio=back)
    weight = next(model.parameters())
    before = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(1.5)
    try:
        with pytest.raises(CertificateError, match="other weights"):
            vtprune.patch(model, ratio=back)
    finally:
        with torch.no_grad():
            weight.copy_(before)
    with pytest.raises(CertificateError, match="another dtype"):
        vtprune.patch(model.to(torch.bfloat16), ratio=back)
    model.to(torch.float32)
    with torch.no_grad():
        weight.copy_(before)


def test_one_request_may_have_a_certificate_of_its_own(prompts, monkeypatch) -> None:
    model = model_of("llava")
    found = made(prompts * 20, monkeypatch, {0.5: 0}, method="divprune")
    with vtprune.patch(model, ratio=0.2, method="divprune") as patch, torch.no_grad():
        for _ in range(2):
            with patch.using(ratio=found):
                model(**prompts[0])
            assert len(patch.last.kept[0]) == round(0.5 * len(patch.last.visual[0]))
        model(**prompts[0])
        assert len(patch.last.kept[0]) == round(0.2 * len(patch.last.visual[0]))
        with patch.using(ratio="auto"):
            model(**prompts[0])
            assert patch.last is not None and len(patch.last.kept[0]) > 0
    with (
        torch.no_grad(),
        vtprune.patch(model, ratio=0.2, method="uniform") as patch,
        patch.using(ratio=found, method="divprune"),
    ):
        model(**prompts[0])
        assert patch.last.method == "divprune" and len(patch.last.kept[0]) == round(0.5 * len(patch.last.visual[0]))
    with (
        vtprune.patch(model, ratio=0.2, method="random") as patch,
        pytest.raises(CertificateError, match="for the method DivPrune"),
        patch.using(ratio=found),
    ):
        pass


def test_energies_are_certified_the_same_way(prompts, monkeypatch, tmp_path: Path) -> None:
    autos = {vtprune.Auto(0.95): 0, vtprune.Auto(0.8): 1, vtprune.Auto(0.5): 30}
    found = made(prompts * 20, monkeypatch, autos, method="divprune")
    assert found.budget == vtprune.Auto(0.8)
    found.save(tmp_path / "c.json")
    with vtprune.patch(model_of("llava"), ratio=vtprune.Certificate.load(tmp_path / "c.json")) as patch:
        assert patch.budget.auto == vtprune.Auto(0.8) and patch.method.name == "divprune"


def test_a_method_that_no_file_holds_has_to_be_passed(prompts, monkeypatch) -> None:
    host = methods.Debiased(methods.PyramidDrop())
    found = made(prompts * 20, monkeypatch, {0.5: 0}, method=host)
    assert found.options is None
    with pytest.raises(CertificateError, match="pass the method itself"):
        vtprune.patch(model_of("llava"), ratio=found)
    with vtprune.patch(model_of("llava"), ratio=found, method=methods.Debiased(methods.PyramidDrop())) as patch:
        assert patch.budget.ratio == 0.5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"risk": 0}, "risk is 0"), ({"risk": 1.5}, "1.5"), ({"confidence": 1}, "confidence is 1"),
        ({"risk": math.nan}, "nan"), ({"candidates": ()}, "no candidates"), ({"candidates": (0.2, 0.5)}, "descending"),
        ({"candidates": (0,)}, "not a ratio"), ({"candidates": (0.5, vtprune.Auto(0.4))}, "descending"),
        ({"pictures": [1]}, "6 prompts and 1 pictures"),
    ],
)  # fmt: skip
def test_what_cannot_be_certified_is_refused(prompts, options, words) -> None:
    with pytest.raises(CertificateError, match=words):
        vtprune.certify(model_of("llava"), prompts, **options)


def test_prompts_without_pictures_certify_nothing(prompts) -> None:
    text = [FAMILIES["llava"].batch([[5, 6]]) for _ in range(60)]
    with pytest.raises(CertificateError, match="no prompt has a visual token"):
        vtprune.certify(model_of("llava"), text, candidates=(0.5,), max_new_tokens=1)
    mixed = vtprune.certify(model_of("llava"), [text[0], prompts[0]], candidates=(0.9,), max_new_tokens=1)
    assert mixed.questions == 2


def test_a_configuration_is_the_same_in_versions_that_write_token_numbers_elsewhere(prompts, monkeypatch) -> None:
    certificate = made(prompts, monkeypatch, {0.5: 6})
    config = copy.deepcopy(model_of("llava").config)
    config.eos_token_id, config.text_config.pad_token_id = 7, 8
    certificate.check_config(config)
    config.text_config.num_attention_heads *= 2
    with pytest.raises(vtprune.CertificateError, match=r"another configuration \(hash \w+, found \w+\); certify"):
        certificate.check_config(config)
    certificate.about["versions"] = {"transformers": "5.0.0"}
    with pytest.raises(vtprune.CertificateError, match=r"or transformers 5\S+ describes it otherwise than 5.0.0 did"):
        certificate.check_config(config)
    certificate.about["versions"] = "of a damaged file"
    with pytest.raises(vtprune.CertificateError, match="another configuration"):
        certificate.check_config(config)


def test_a_patched_model_and_a_broken_file_are_refused(prompts, tmp_path: Path) -> None:
    with vtprune.patch(model_of("llava"), ratio=0.5), pytest.raises(VTPruneError, match="remove the patch"):
        vtprune.certify(model_of("llava"), prompts)
    for text in ("{}", "[]", "nothing", json.dumps({"ratio": 0.5})):
        (tmp_path / "c.json").write_text(text)
        with pytest.raises(CertificateError, match="is no certificate"):
            vtprune.Certificate.load(tmp_path / "c.json")
    with pytest.raises(CertificateError):
        vtprune.Certificate.load(tmp_path / "absent.json")


def test_the_benchmark_sees_broken_certificates(monkeypatch) -> None:
    """Valid certificates hold; those of a test that always passes are reported as broken."""
    from benchmarks import certify as benchmark

    shares = np.linspace(0, 0.4, len(benchmark.CANDIDATES))
    losses = np.random.default_rng(0).random((len(shares), 300)) < shares[:, None]
    honest = benchmark.judge(losses, 0.1, 0.9, splits=60)
    assert honest["population"]["kept"] and honest["halves"]["kept"] and honest["ratio_of_all"] < 1
    monkeypatch.setattr(benchmark, "exact_p_value", lambda changes, n, risk: 0.0)
    wrong = benchmark.judge(losses, 0.1, 0.9, splits=60)
    assert wrong["population"] == {"broken": 1.0, "allowed": wrong["population"]["allowed"], "kept": False}
    assert not wrong["halves"]["kept"]


def test_the_committed_benchmark_broke_no_promise() -> None:
    """In the committed results, no more certificates are broken than allowed, within the noise."""
    from benchmarks import certify as benchmark

    data = json.loads(benchmark.OUT.read_text(encoding="utf-8"))
    pairs = {(row["model"], row["method"]) for row in data["rows"]}
    assert len({model for model, _ in pairs}) == 2 and len(pairs) == 6
    for row in data["rows"]:
        for found in row["certificates"]:
            assert found["splits"] == benchmark.SPLITS
            for kind in ("population", "halves"):
                noise = 2 * math.sqrt(found["confidence"] * (1 - found["confidence"]) / benchmark.SPLITS)
                assert found[kind]["broken"] <= 1 - found["confidence"] + noise
