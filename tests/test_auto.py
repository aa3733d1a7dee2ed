# SPDX-License-Identifier: Apache-2.0
"""`ratio="auto"`: a token count for each picture, from the residual energy of its features."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from families import FAMILIES, Image, Video
from support import MIXED, ONE, model_of, pruned

import vtprune
from vtprune import methods
from vtprune.core.budget import Budget
from vtprune.core.energy import bounds, energy_left
from vtprune.errors import BudgetError, VTPruneError


def mixture(directions: int, rows: int = 30, seed: int = 0) -> torch.Tensor:
    """`[rows, 16]` in a subspace of `directions` dimensions, plus a little noise."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(directions, 16, generator=generator)
    noise = 1e-3 * torch.randn(rows, 16, generator=generator)
    return torch.randn(rows, directions, generator=generator) @ basis + noise


def test_the_count_follows_how_many_directions_there_are() -> None:
    features = torch.cat([mixture(n) for n in (1, 3, 9)])
    offsets = torch.tensor([0, 30, 60, 90])
    counts = vtprune.Auto(0.999, 0.0, 1.0).counts(features, offsets)
    assert counts == [1, 3, 9]
    assert vtprune.Auto(0.999, 0.1, 0.2).counts(features, offsets) == [3, 3, 6]
    for left, k in zip(energy_left(features, offsets), counts, strict=True):
        assert len(left) == 30 and left[k - 1] <= 1e-3 and (k == 1 or left[k - 2] > 1e-3)


def test_counts_rise_with_the_energy_and_ignore_scale_and_order() -> None:
    features, offsets = mixture(12, seed=1), torch.tensor([0, 30])
    autos = [vtprune.Auto(energy, 0.0, 1.0) for energy in (0.3, 0.6, 0.9, 0.99, 0.9999)]
    counts = [auto.counts(features, offsets) for auto in autos]
    assert counts == sorted(counts) and counts[0] < counts[-1]
    for other in (features * 1000, features.flip(0)):
        assert [auto.counts(other, offsets) for auto in autos] == counts


def test_bounds_are_shares_rounded_inwards() -> None:
    assert bounds(130, 0.02, 0.25) == (3, 32)
    assert bounds(10, 0.0, 1.0) == (1, 10) and bounds(3, 0.0, 0.1) == (1, 1) and bounds(100, 0.29, 0.29) == (29, 29)
    features, auto = torch.zeros(5, 4), vtprune.Auto(0.9, 0.0, 1.0)
    assert auto.counts(features, torch.tensor([0, 5])) == [1]
    assert auto.counts(features[:0], torch.tensor([0, 0])) == [0]


@pytest.mark.parametrize("method", methods.names())
@torch.no_grad()
def test_every_method_spends_what_each_picture_needs(method: str) -> None:
    model, batch = model_of("llava"), FAMILIES["llava"].batch(MIXED)
    auto = vtprune.Auto(energy=0.9, min=0.05, max=0.6)
    with pruned(model, methods.get(method)(), ratio=auto) as (patch, spy):
        model(**batch)
        kept = [len(k) for k in patch.last.kept]
        places = spy.choices[0][0]
        report = str(patch.last.report())
    embeds = model.get_input_embeddings()(batch["input_ids"])
    features = model.model.get_image_features(batch["pixel_values"])
    features = torch.cat(list(getattr(features, "pooler_output", features))).to(embeds)
    sizes = torch.unique_consecutive(places.image, return_counts=True)[1]
    counts = torch.tensor(auto.counts(features.reshape(-1, features.shape[-1]), torch.tensor([0, *sizes]).cumsum(0)))
    first = torch.unique_consecutive(places.sample[torch.tensor([0, *sizes[:-1]]).cumsum(0)], return_counts=True)[1]
    assert kept[: len(first)] == [int(part.sum()) for part in counts.split(first.tolist())]
    assert "auto (energy 0.9" in report


@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl", "internvl", "llava_onevision"])
@torch.no_grad()
def test_a_picture_gets_in_a_batch_what_it_gets_alone(family: str) -> None:
    model, counts = model_of(family), []
    with vtprune.patch(model, ratio=vtprune.Auto(0.6, 0.0, 1.0), method="divprune") as patch:
        for prompts in (MIXED, MIXED[:1], MIXED[1:2]):
            model(**FAMILIES[family].batch(prompts))
            counts.append([len(k) for k in patch.last.kept if len(k)])
    assert counts[0] == counts[1] + counts[2]
    assert len(set(counts[0])) > 1


@torch.no_grad()
def test_generation_in_every_form_keeps_the_same() -> None:
    model, batch = model_of("qwen2_5_vl"), FAMILIES["qwen2_5_vl"].batch(ONE)
    kept = []
    with vtprune.patch(model, ratio="auto") as patch:
        assert patch.budget.auto == vtprune.Auto()
        for options in ({}, {"use_cache": False}, {"num_beams": 2}):
            model.generate(**batch, max_new_tokens=3, do_sample=False, **options)
            kept.append(patch.last.kept[0].tolist())
    assert kept[0] == kept[1] == kept[2]


@torch.no_grad()
def test_a_clip_is_one_picture() -> None:
    family = FAMILIES["qwen2_5_vl"]
    model = model_of("qwen2_5_vl")
    with pruned(model, methods.Random(), ratio=vtprune.Auto(0.8, 0.0, 1.0)) as (patch, spy):
        model(**family.batch([[3, Video(0), 5]]))
        tokens = spy.choices[0][0]
        assert int(tokens.frame.max()) > 0
        (expected,) = vtprune.Auto(0.8, 0.0, 1.0).counts(tokens.hidden, torch.tensor([0, len(tokens)]))
        assert len(patch.last.kept[0]) == expected


def test_all_may_stay_where_the_bounds_allow_it() -> None:
    model, batch = model_of("llava"), FAMILIES["llava"].batch(ONE)
    with vtprune.patch(model, ratio=vtprune.Auto(energy=1 - 1e-9, min=1.0, max=1.0)) as patch, torch.no_grad():
        got = model(**batch).logits
        assert len(patch.last.kept[0]) == len(patch.last.visual[0])
    with torch.no_grad():
        assert torch.equal(got, model(**batch).logits)


def test_what_cannot_be_is_refused() -> None:
    for options, words in (
        ({"energy": 0}, "energy is 0; expected a share above 0 and below 1"), ({"energy": 1.0}, "energy is 1"),
        ({"energy": "a"}, "'a'"), ({"energy": math.nan}, "nan"), ({"min": -0.1}, "min is -0.1"),
        ({"max": 0}, "max is 0; expected a share above 0 and up to 1"),
        ({"min": 0.6, "max": 0.5}, "min <= max"), ({"max": True}, "True"),
    ):  # fmt: skip
        with pytest.raises(BudgetError, match=words):
            vtprune.Auto(**options)
    with pytest.raises(BudgetError, match="'automatic'"):
        Budget(ratio="automatic")  # type: ignore[arg-type]
    with pytest.raises(BudgetError, match="exactly one"):
        Budget(ratio="auto", keep=3)
    with (
        vtprune.patch(model_of("llava"), ratio="auto") as patch,
        pytest.raises(VTPruneError, match="depends on the pic"),
    ):
        patch.mean_ratio  # noqa: B018


def test_saved_and_read(tmp_path: Path) -> None:
    auto, path = vtprune.Auto(0.75, 0.1, 0.4), tmp_path / "auto.json"
    auto.save(path, mean_ratio=0.2)
    assert vtprune.Auto.load(path) == auto
    path.write_text('{"energy": 0.5}')
    with pytest.raises(BudgetError, match="is no file of an automatic ratio"):
        vtprune.Auto.load(path)


@torch.no_grad()
def test_the_energy_is_given_beside_auto() -> None:
    model, batch = FAMILIES["llava"].build(), FAMILIES["llava"].batch([[3, Image(0), 5]])
    kept = {}
    for name, budget in {
        "auto": dict(ratio="auto", energy=0.6),
        "Auto": dict(ratio=vtprune.Auto(energy=0.6)),
    }.items():
        with vtprune.patch(model, **budget) as patch:
            model(**batch)
            kept[name] = patch.last.kept[0].tolist()
    assert kept["auto"] == kept["Auto"]
    with vtprune.patch(model, ratio=0.5) as patch:
        with patch.using(ratio="auto", energy=0.6):
            model(**batch)
        assert patch.last.kept[0].tolist() == kept["Auto"]
    for wrong in (dict(ratio=0.5, energy=0.9), dict(energy=0.9), dict(ratio="auto", energy=2)):
        with pytest.raises(vtprune.BudgetError, match="energy"):
            vtprune.patch(model, **wrong)
