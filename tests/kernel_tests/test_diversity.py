# SPDX-License-Identifier: Apache-2.0
"""Farthest-point and DPP selection: fast paths against their specifications."""

from __future__ import annotations

import importlib

import pytest
import torch

from kernel_tests.cases import LENGTHS, assert_order, budgets, clustered, exact_rows, offsets_of, strided
from vtprune_kernels import dpp_map, weighted_farthest_point
from vtprune_kernels._cosine import Cosine
from vtprune_kernels.dpp_map.naive import dpp_map as naive_dpp
from vtprune_kernels.weighted_farthest_point.naive import weighted_farthest_point as naive_farthest

pytestmark = pytest.mark.usefixtures("path")


def case(lengths, width, seed):
    features = clustered(sum(lengths), width, seed=seed)
    weights = torch.rand(sum(lengths), generator=torch.Generator().manual_seed(seed))
    return features, weights, offsets_of(lengths)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("kind", ["one", "some", "all"])
@pytest.mark.parametrize("width", [60, 80])
def test_farthest_point_equals_specification(lengths, kind, width):
    features, weights, offsets = case(lengths, width, seed=1)
    counts = budgets(lengths, kind)
    for weight in (None, weights):
        order = weighted_farthest_point(features, weight, offsets, counts)
        assert_order(order, naive_farthest(features, weight, offsets, counts), offsets, counts)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("kind", ["one", "some"])
@pytest.mark.parametrize("width", [160, 200])
def test_dpp_equals_specification(lengths, kind, width):
    features, relevance, offsets = case(lengths, width, seed=2)
    counts = budgets(lengths, kind)
    order = dpp_map(features, relevance + 0.1, offsets, counts)
    assert_order(order, naive_dpp(features, relevance + 0.1, offsets, counts), offsets, counts)


def test_dpp_maximizes_the_determinant_greedily():
    features, relevance, offsets = case((40,), 32, seed=3)
    unit = features.double() / features.double().norm(dim=1, keepdim=True)
    kernel = relevance[:, None].double() * (unit @ unit.T) * relevance.double()
    chosen: list[int] = []
    for _ in range(12):
        rest = [row for row in range(40) if row not in chosen]
        chosen.append(max(rest, key=lambda row: torch.linalg.det(kernel[chosen + [row]][:, chosen + [row]])))
    assert dpp_map(features, relevance, offsets, torch.tensor([12]))[0].tolist() == chosen


def test_dpp_beyond_the_rank_falls_back_to_relevance():
    rows = torch.eye(8).repeat(6, 1)
    relevance = torch.arange(48, 0, -1) / 48.0
    order = dpp_map(rows, relevance, torch.tensor([0, 48]), torch.tensor([48]))
    assert order[0].tolist() == list(range(48))
    narrow = clustered(60, 8, seed=4)
    counts = torch.tensor([60])
    order = dpp_map(narrow, relevance.repeat(2)[:60], torch.tensor([0, 60]), counts)
    assert order[0].sort().values.tolist() == list(range(60))


def test_ties_go_to_the_smaller_row():
    rows, offsets, counts = exact_rows(20, 32, seed=5).repeat(3, 1), torch.tensor([0, 60]), torch.tensor([40])
    halves = torch.tensor([1.0, 0.5, 0.5]).repeat(20)
    for weights in (None, torch.ones(60), halves):
        order = weighted_farthest_point(rows, weights, offsets, counts)
        assert_order(order, naive_farthest(rows, weights, offsets, counts), offsets, counts)
    generic = clustered(20, 7, seed=9)  # norms are rounded, but all rows are exactly equal
    for relevance in (torch.ones(20), torch.full((20,), 0.3)):
        assert dpp_map(generic, relevance, torch.tensor([0, 20]), torch.tensor([1])).tolist() == [[0]]


def test_dpp_orders_duplicates_by_relevance_and_not_by_rounding():
    rows = clustered(8, 37, seed=10).repeat(4, 1)
    relevance = torch.rand(32, generator=torch.Generator().manual_seed(11)) + 0.1
    offsets, counts = torch.tensor([0, 32]), torch.tensor([32])
    for choose in (dpp_map, naive_dpp):
        order = choose(rows, relevance, offsets, counts)[0]
        assert (order[:8] % 8).unique().numel() == 8
        assert relevance[order[8:]].tolist() == sorted(relevance[order[8:]].tolist(), reverse=True)


@pytest.mark.parametrize("others", [0, 3, 400])
def test_rows_that_are_each_others_nearest_tie(others):
    """The two rows have the same distance, whatever the order of summation, so the smaller index comes first."""
    for seed in range(20):
        rows = clustered(others, 37, seed=seed, clusters=1, noise=0.01)
        pair = torch.randn(2, 37, generator=torch.Generator().manual_seed(seed)) - 3 * rows.sum(0) / max(1, others)
        rows, offsets, counts = torch.cat([rows, pair]), torch.tensor([0, others + 2]), torch.tensor([1])
        expected = naive_farthest(rows, None, offsets, counts)
        assert weighted_farthest_point(rows, None, offsets, counts).tolist() == expected.tolist() == [[others]]


def nonsense(cosine):
    part = cosine.rounded(torch.float32)
    part.rows = torch.randn(cosine.rows.shape, generator=torch.Generator().manual_seed(12))
    return part


@pytest.mark.parametrize("rows", [257, 577, 1100])
@pytest.mark.parametrize(
    "screen", [lambda c: c, lambda c: c.rounded(torch.bfloat16), nonsense], ids=["f32", "bf16", "-"]
)
def test_first_pick_does_not_depend_on_the_guesses(rows, screen, monkeypatch):
    """The first pick is that of float32, whatever neighbors the low-precision screening proposes."""
    module = importlib.import_module("vtprune_kernels.weighted_farthest_point.isolated")
    monkeypatch.setattr(module, "screen_of", screen)
    offsets, counts = torch.tensor([0, rows]), torch.tensor([3])
    noise = torch.randn(rows, 48, generator=torch.Generator().manual_seed(rows))
    holes = noise.clone()
    holes[rows // 2 :: 40] = 0
    for features in (noise, holes, clustered(rows, 48, seed=rows), exact_rows(rows, 32, seed=rows), noise.bfloat16()):
        order = weighted_farthest_point(features, None, offsets, counts)
        assert torch.equal(order, naive_farthest(features, None, offsets, counts))


def test_first_picks_follow_the_published_rules():
    angles = torch.tensor([0.0, 0.1, 1.5, 1.55, 3.0])  # the last one is farthest from its nearest neighbor
    rows = torch.stack([angles.cos(), angles.sin()], 1)
    offsets, counts = torch.tensor([0, 5]), torch.tensor([3])
    assert weighted_farthest_point(rows, None, offsets, counts)[0].tolist() == [4, 0, 2]
    weights = torch.tensor([0.1, 0.1, 1.0, 0.1, 0.01])
    assert weighted_farthest_point(rows, weights, offsets, counts)[0].tolist() == [2, 0, 4]


@pytest.mark.parametrize("weights", [torch.zeros(30), torch.linspace(-1, 1, 30), torch.full((30,), torch.nan)])
def test_unusual_weights_still_give_the_budget(weights):
    features, _, offsets = case((30,), 24, seed=6)
    order = weighted_farthest_point(features, weights, offsets, torch.tensor([30]))
    assert order[0].sort().values.tolist() == list(range(30))
    counts = torch.tensor([12])
    order = weighted_farthest_point(features, weights, offsets, counts)
    assert torch.equal(order, naive_farthest(features, weights, offsets, counts))


def test_rows_of_zeros_and_broken_numbers_still_give_the_budget():
    features, weights, offsets = case((30,), 24, seed=7)
    features[3:8] = 0
    features[9] = torch.nan
    for order in (
        weighted_farthest_point(features, None, offsets, torch.tensor([30])),
        weighted_farthest_point(features, weights, offsets, torch.tensor([30])),
        dpp_map(features, weights, offsets, torch.tensor([30])),
    ):
        assert order[0].sort().values.tolist() == list(range(30))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_strides(dtype):
    features, weights, offsets = case((77, 20), 96, seed=8)
    features, counts = features.to(dtype), torch.tensor([25, 4])
    whole = features.float()
    for weight in (None, weights):
        order = weighted_farthest_point(strided(features), weight, offsets, counts)
        assert_order(order, naive_farthest(whole, weight, offsets, counts), offsets, counts)
    order = dpp_map(strided(features), strided(weights), offsets, counts)
    assert_order(order, naive_dpp(whole, weights, offsets, counts), offsets, counts)


def test_rows_that_are_given_in_half_precision_are_guessed_with_as_they_are():
    features = clustered(30, 16, seed=1).bfloat16()
    cosine = Cosine(features)
    assert cosine.rounded(torch.bfloat16).rows.data_ptr() == features.data_ptr()
    part = cosine.subset(torch.tensor([4, 2]))
    assert torch.equal(part.rounded(torch.bfloat16).rows, features[[4, 2]])
    features[3, 0] = torch.inf
    assert Cosine(features).rounded(torch.bfloat16).rows.isfinite().all()


@pytest.mark.parametrize("rows", [20, 400])
def test_if_every_row_has_a_copy_the_first_row_comes_first(rows):
    for seed in range(6):
        features = torch.randn(rows, 24, generator=torch.Generator().manual_seed(seed)).repeat(2, 1)
        inputs = features, None, torch.tensor([0, 2 * rows]), torch.tensor([5])
        order = weighted_farthest_point(*inputs)
        assert int(order[0, 0]) == 0
        assert torch.equal(order, naive_farthest(*inputs))
