# SPDX-License-Identifier: Apache-2.0
"""Facility location and residual selection: fast paths against specifications and mathematical properties."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor

from benchmarks.kernels import extra_memory
from kernel_tests.cases import LENGTHS, assert_order, budgets, clustered, exact_rows, offsets_of, strided
from vtprune_kernels import facility_location, residual_pivots
from vtprune_kernels.facility_location.naive import facility_location as naive_coverage
from vtprune_kernels.residual_pivots import residual_energy
from vtprune_kernels.residual_pivots.naive import residual_pivots as naive_residual


def case(lengths, width, seed):
    features = clustered(sum(lengths), width, seed=seed)
    weights = torch.rand(sum(lengths), generator=torch.Generator().manual_seed(seed)) + 0.1
    return features, weights, offsets_of(lengths)


@pytest.fixture(params=[None, 0], ids=["matrix", "no matrix"])
def memory(request, monkeypatch):
    if request.param is not None:
        module = importlib.import_module("vtprune_kernels.facility_location.vectorized")
        monkeypatch.setattr(module, "MATRIX_BYTES", request.param)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("kind", ["one", "some", "all"])
def test_facility_location_equals_specification(lengths, kind, memory):
    features, weights, offsets = case(lengths, 60, seed=1)
    counts = budgets(lengths, kind)
    for weight in (None, weights):
        for combine in ("product", "sum"):
            order = facility_location(features, weight, offsets, counts, combine=combine)
            expected = naive_coverage(features, weight, offsets, counts, combine=combine)
            assert_order(order, expected, offsets, counts)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("kind", ["one", "some"])
def test_residual_pivots_equal_specification(lengths, kind):
    features, weights, offsets = case(lengths, 200, seed=2)
    counts = budgets(lengths, kind)
    for weight in (None, weights):
        order = residual_pivots(features, weight, offsets, counts)
        assert_order(order, naive_residual(features, weight, offsets, counts), offsets, counts)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("width", [64, 192])
def test_more_picks_than_dimensions(width):
    """After as many picks as dimensions, residuals are rounding errors and do not affect the order."""
    lengths = (2 * width, width + 20, 30)
    for seed in range(3):
        features = torch.randn(sum(lengths), width, generator=torch.Generator().manual_seed(seed))
        weights = torch.rand(sum(lengths), generator=torch.Generator().manual_seed(seed)) + 0.1
        offsets, counts = offsets_of(lengths), torch.tensor([width + 15, width + 15, 20])
        for weight in (None, weights):
            order = residual_pivots(features, weight, offsets, counts)
            assert torch.equal(order, naive_residual(features, weight, offsets, counts))


def coverage(features: Tensor, chosen: list[int]) -> float:
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    return float((unit @ unit[chosen].T).amax(1).clamp_min(0).sum())


def test_every_pick_adds_most_and_gains_never_rise():
    features, offsets = clustered(40, 16, seed=3), torch.tensor([0, 40])
    order = facility_location(features, None, offsets, torch.tensor([12]))[0].tolist()
    added = []
    for step, pick in enumerate(order):
        before = coverage(features, order[:step]) if step else 0.0
        gains = {row: coverage(features, [*order[:step], row]) - before for row in range(40) if row not in order[:step]}
        assert gains[pick] == pytest.approx(max(gains.values()), abs=1e-6)
        added.append(gains[pick])
    assert all(later <= earlier + 1e-6 for earlier, later in zip(added, added[1:], strict=False))


def test_greedy_coverage_reaches_its_share_of_the_best():
    """Greedy facility location reaches at least 1 - 1/e of the best set's coverage (monotone and submodular)."""
    from itertools import combinations

    for seed in range(5):
        features = clustered(12, 6, seed=seed, clusters=5)
        order = facility_location(features, None, torch.tensor([0, 12]), torch.tensor([4]))[0].tolist()
        best = max(coverage(features, list(chosen)) for chosen in combinations(range(12), 4))
        assert coverage(features, order) >= (1 - 1 / torch.e) * best - 1e-6


def test_permuted_rows_give_the_permuted_choice():
    features, weights, offsets = case((90,), 120, seed=4)
    permutation = torch.randperm(90, generator=torch.Generator().manual_seed(5))
    counts = torch.tensor([25])
    for choose in (facility_location, residual_pivots):
        order = choose(features, weights, offsets, counts)[0]
        moved = choose(features[permutation], weights[permutation], offsets, counts)[0]
        assert torch.equal(permutation[moved], order)


def test_length_matters_to_the_residual_and_not_to_coverage():
    features, _, offsets = case((90,), 120, seed=6)
    louder, counts = features.clone(), torch.tensor([10])
    louder[70] *= 8
    assert torch.equal(
        facility_location(louder, None, offsets, counts), facility_location(features, None, offsets, counts)
    )
    before = residual_pivots(features, None, offsets, counts)[0, 0]
    assert before != 70 and residual_pivots(louder, None, offsets, counts)[0, 0] == 70


def test_residual_choice_ignores_rotation_and_scale():
    features, weights, offsets = case((90,), 64, seed=7)
    rotation = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(8)))[0]
    counts = torch.tensor([30])
    order = residual_pivots(features, weights, offsets, counts)
    assert torch.equal(residual_pivots(features @ rotation, weights, offsets, counts), order)
    for factor in (2.0**-12, 2.0**40):
        assert torch.equal(residual_pivots(features * factor, weights, offsets, counts), order)


def test_a_copy_of_a_chosen_row_comes_after_all_others():
    features, _, offsets = case((20,), 64, seed=9)
    rows = torch.cat([features, features[[3, 11]] * 0.5])
    offsets, counts = torch.tensor([0, 22]), torch.tensor([22])
    order = residual_pivots(rows, None, offsets, counts)[0].tolist()
    assert set(order[20:]) == {20, 21}
    order = facility_location(rows, None, offsets, counts)[0].tolist()
    for original, copy in ((3, 20), (11, 21)):
        assert order.index(original) < order.index(copy)


def test_beyond_the_rank_rows_come_by_energy():
    narrow, counts = clustered(60, 8, seed=10), torch.tensor([60])
    weights = torch.rand(60, generator=torch.Generator().manual_seed(1)) + 0.1
    order = residual_pivots(narrow, weights, torch.tensor([0, 60]), counts)[0]
    rest = (weights * narrow.square().sum(1))[order[8:]]
    assert (rest.diff() <= 0).all()
    assert order.sort().values.tolist() == list(range(60))


def test_ties_go_to_the_smaller_row(memory):
    rows, offsets, counts = exact_rows(20, 32, seed=5).repeat(3, 1), torch.tensor([0, 60]), torch.tensor([40])
    halves = torch.tensor([1.0, 0.5, 0.5]).repeat(20)
    for weights in (None, torch.ones(60), halves, torch.zeros(60)):
        order = facility_location(rows, weights, offsets, counts)
        assert_order(order, naive_coverage(rows, weights, offsets, counts), offsets, counts)
    assert residual_pivots(rows, None, offsets, torch.tensor([1])).tolist() == [[0]]
    assert residual_pivots(rows, halves, offsets, torch.tensor([1])).tolist() == [[0]]


@pytest.mark.parametrize("weights", [torch.zeros(30), torch.linspace(-1, 1, 30), torch.full((30,), torch.nan)])
def test_unusual_weights_still_give_the_budget(weights):
    features, _, offsets = case((30,), 24, seed=6)
    for choose, naive in ((facility_location, naive_coverage), (residual_pivots, naive_residual)):
        everything = choose(features, weights, offsets, torch.tensor([30]))
        assert everything[0].sort().values.tolist() == list(range(30))
        counts = torch.tensor([12])
        assert torch.equal(choose(features, weights, offsets, counts), naive(features, weights, offsets, counts))


def test_rows_of_zeros_and_broken_numbers_come_last():
    features, weights, offsets = case((30,), 40, seed=7)
    features[3:8] = 0
    features[9] = torch.nan
    features[12, 2] = torch.inf
    for choose in (facility_location, naive_coverage, residual_pivots, naive_residual):
        for weight in (None, weights):
            order = choose(features, weight, offsets, torch.tensor([30]))[0].tolist()
            assert sorted(order) == list(range(30))
            assert set(order[-7:]) == {3, 4, 5, 6, 7, 9, 12}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_strides(dtype):
    features, weights, offsets = case((77, 20), 96, seed=8)
    features, counts = features.to(dtype), torch.tensor([25, 4])
    for choose, naive in ((facility_location, naive_coverage), (residual_pivots, naive_residual)):
        for weight in (None, weights):
            order = choose(strided(features), None if weight is None else strided(weight), offsets, counts)
            assert_order(order, naive(features.float(), weight, offsets, counts), offsets, counts)


def test_energy_left_is_what_the_projection_leaves():
    features, _, offsets = case((70, 30, 0), 40, seed=9)
    counts = torch.tensor([50, 12, 0])
    order = residual_pivots(features, None, offsets, counts)
    left = residual_energy(features, order, offsets)
    assert (left.diff(dim=1) <= 1e-6).all() and (left >= 0).all()
    for number, (start, stop, count) in enumerate([(0, 70, 40), (70, 100, 12)]):
        rows = features[start:stop].double()
        for step in (1, 5, count):
            basis = torch.linalg.qr(features[order[number, :step]].double().T)[0]
            expected = 1 - (rows @ basis).square().sum() / rows.square().sum()
            assert float(left[number, step - 1]) == pytest.approx(float(expected), abs=1e-5)
    assert float(left[0, -1]) == pytest.approx(0, abs=1e-5)  # ten picks beyond the rank
    assert (left[1, 11:] == left[1, 11]).all() and (left[2] == 0).all()


@pytest.mark.parametrize("length", [2880, 6000])
@pytest.mark.parametrize("choose", [facility_location, residual_pivots])
def test_extra_memory_has_a_bound(choose, length):
    """Extra memory is bounded, for 2,880 rows (all pairs fit into 64 MiB) and 6,000 rows (they do not)."""
    features = clustered(length, 16, seed=9)
    offsets, counts = torch.tensor([0, length]), torch.tensor([12])
    assert 0 < extra_memory(lambda: choose(features, None, offsets, counts), torch.device("cpu")) <= 64 * 2**20


@pytest.mark.parametrize("noise", [0.0, 3e-4])
def test_nearly_dependent_rows_are_chosen_as_specified(noise):
    for seed in range(12):
        g = torch.Generator().manual_seed(seed)
        rows, width, rank = 60 + 17 * seed, 40 + 5 * seed, 8 + seed
        features = torch.randn(rows, rank, generator=g) @ torch.randn(rank, width, generator=g)
        features += noise * torch.randn(rows, width, generator=g)
        weights = torch.rand(rows, generator=g) * 0.98 + 0.02
        offsets, counts = torch.tensor([0, rows]), torch.tensor([rank + 3 + rows // 8])
        order = residual_pivots(features, weights, offsets, counts)
        assert_order(order, naive_residual(features, weights, offsets, counts), offsets, counts)


def test_rows_that_are_tiny_beside_the_longest_come_by_energy():
    features = torch.randn(30, 16, generator=torch.Generator().manual_seed(0))
    features[7] *= 1e6
    order = residual_pivots(features, None, torch.tensor([0, 30]), torch.tensor([9]))[0].tolist()
    assert order == [7, *[i for i in features.norm(dim=1).argsort(descending=True).tolist() if i != 7][:8]]


@pytest.mark.parametrize("rows, width", [(40, 64), (144, 96), (300, 400)])
@pytest.mark.parametrize("choose", [facility_location, residual_pivots])
def test_the_first_of_several_copies_is_chosen(choose, rows, width, memory):
    for seed in range(5):
        features = clustered(rows, width, seed=seed, noise=0.3).repeat(2, 1)
        weights = torch.rand(rows, generator=torch.Generator().manual_seed(seed)).repeat(2)
        order = choose(features, weights, torch.tensor([0, 2 * rows]), torch.tensor([rows // 4]))
        assert int(order.max()) < rows


@pytest.mark.parametrize("rows", [40, 400])
def test_a_slightly_larger_gain_wins(rows, memory):
    """Rows in orthogonal pairs; the last pair is a little closer than the others."""
    cosine = torch.full((rows // 2,), 0.5, dtype=torch.float64)
    cosine[-1] += 2e-6
    first = torch.eye(rows, dtype=torch.float64)[::2]
    second = cosine[:, None] * first + (1 - cosine**2).sqrt()[:, None] * torch.eye(rows, dtype=torch.float64)[1::2]
    features = torch.stack([first, second], 1).flatten(0, 1).float()
    offsets, counts = torch.tensor([0, rows]), torch.tensor([2])
    for weights in (None, torch.full((rows,), 3.0)):
        for choose in (facility_location, naive_coverage):
            assert choose(features, weights, offsets, counts).tolist() == [[rows - 2, 0]]


def test_rounding_does_not_rank_many_copies(memory):
    """All rows are one up to rounding, more than are evaluated together."""
    noise = 1e-7 * torch.randn(300, 40, generator=torch.Generator().manual_seed(1))
    features = torch.linspace(-1, 2, 40) * (1 + noise)
    weights = 1 + 1e-7 * torch.randn(300, generator=torch.Generator().manual_seed(2))
    offsets, counts = torch.tensor([0, 300]), torch.tensor([5])
    for weight in (None, weights):
        for choose in (facility_location, naive_coverage):
            assert choose(features, weight, offsets, counts).tolist() == [[0, 1, 2, 3, 4]]
