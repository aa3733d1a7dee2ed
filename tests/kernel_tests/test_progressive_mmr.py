# SPDX-License-Identifier: Apache-2.0
"""Progressive MMR: the fast path against the specification, and the specification against its definition."""

from __future__ import annotations

import itertools

import pytest
import torch

from kernel_tests.cases import LENGTHS, assert_order, budgets, clustered, offsets_of, strided
from vtprune_kernels import progressive_mmr
from vtprune_kernels.progressive_mmr import Duplication, closest_other
from vtprune_kernels.progressive_mmr.naive import progressive_mmr as naive

pytestmark = pytest.mark.usefixtures("path")


def case(lengths, groups=2, key_size=64, value_size=48, seed=0):
    rows = sum(lengths)
    relevance = torch.rand(rows, generator=torch.Generator().manual_seed(seed))
    keys = clustered(rows, groups, key_size, seed=seed + 1) * 0.7
    values = clustered(rows, groups, value_size, seed=seed + 2)
    return relevance, keys, values, offsets_of(lengths)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("kind", ["one", "some", "all"])
def test_fast_path_equals_specification(lengths, kind):
    counts = budgets(lengths, kind)
    for seed, (groups, size) in enumerate([(1, 60), (2, 64), (4, 80)]):
        if sum(lengths) > 200 and kind == "all":
            counts = counts.clamp_max(90)
        relevance, keys, values, offsets = case(lengths, groups, size, size, seed=10 * seed)
        order = progressive_mmr(relevance, keys, values, offsets, counts)
        assert_order(order, naive(relevance, keys, values, offsets, counts), offsets, counts)


@pytest.mark.parametrize(
    "options", list(itertools.product((1, 3, 16), (1, 4), (0.0, 0.25, 1.0), ("linear", "log"))), ids=str
)
def test_every_schedule_and_objective_equals_specification(options):
    chunk, pool, growth, objective = options
    relevance, keys, values, offsets = case((61, 17), seed=5)
    relevance = relevance.log() if objective == "log" else relevance
    counts, settings = torch.tensor([30, 17]), (0.6, chunk, growth, pool, objective)
    expected = naive(relevance, keys, values, offsets, counts, *settings)
    assert_order(progressive_mmr(relevance, keys, values, offsets, counts, *settings), expected, offsets, counts)


@pytest.mark.parametrize("size", [4, 16, 60])
def test_similarity_equals_the_cosine_of_rank_one_updates(size):
    """Similarity equals the cosine of rank-one updates from explicit kernel features in float64."""
    _, keys, values, _ = case((40,), key_size=size)
    keys, k, v = keys + 3, keys.double() + 3, values.double()
    kappa = torch.exp(torch.einsum("igd,jgd->gij", k, k) / k.shape[-1] ** 0.5)
    inner = torch.einsum("igd,jgd->gij", v, v) * kappa  # <dW_i, dW_j> per head
    norm = inner.diagonal(dim1=1, dim2=2).sqrt()
    expected = (inner / (norm[:, :, None] * norm[:, None])).mean(0)
    everything = torch.arange(40)
    found = Duplication(keys, values)(everything, everything)
    torch.testing.assert_close(found.double(), expected, atol=2e-6, rtol=0)
    torch.testing.assert_close(found.diagonal(), torch.ones(40), atol=2e-6, rtol=0)
    torch.testing.assert_close(found, found.T, atol=1e-6, rtol=0)
    assert torch.linalg.eigvalsh(inner).min() > -1e-9 * inner.abs().max()


def brute_force(relevance, similarity, count, duplication):
    """Exact greedy selection in float64 on the full matrix."""
    chosen = []
    while len(chosen) < count:
        closest = similarity[:, chosen].amax(1).clamp_min(0) if chosen else torch.zeros_like(relevance)
        value = relevance - duplication * closest
        value[chosen] = -torch.inf
        chosen.append(int(value.argmax()))
    return chosen


@pytest.mark.parametrize("pool", [1, 4])
def test_chunk_of_one_is_the_exact_greedy_choice(pool):
    relevance, keys, values, offsets = case((200,), seed=8)
    unit = values.double() / values.double().norm(dim=-1, keepdim=True)
    distance = (keys.double()[:, None] - keys.double()[None]).square().sum(-1)
    cosine = torch.einsum("igd,jgd->ijg", unit, unit)
    similarity = (cosine * torch.exp(-distance / (2 * 64**0.5))).mean(-1)
    for duplication in (0.0, 0.3, 1.0):
        order = progressive_mmr(relevance, keys, values, offsets, torch.tensor([50]), duplication, chunk=1, pool=pool)
        assert order[0].tolist() == brute_force(relevance.double(), similarity, 50, duplication)


def test_ties_go_to_the_smaller_row():
    rows = torch.eye(16)[:12].repeat(4, 1)[:, None]  # every row four times
    relevance = torch.tensor([0.5, 0.25]).repeat(24)
    counts, offsets = torch.tensor([20]), torch.tensor([0, 48])
    order = progressive_mmr(relevance, rows, rows, offsets, counts)
    assert_order(order, naive(relevance, rows, rows, offsets, counts), offsets, counts)
    assert order[0, :6].tolist() == [0, 2, 4, 6, 8, 10]
    flat = progressive_mmr(torch.zeros(48), rows, rows, offsets, torch.tensor([48]), duplication=0.0)
    assert flat[0].tolist() == list(range(48))


def test_duplicates_wait_until_the_rest_is_worth_less():
    relevance, keys, values, _ = case((30,), seed=4)
    relevance = relevance * 0.2 + 0.8  # spread below the penalty of 0.5
    keys, values = torch.cat([keys, keys]) * 8, torch.cat([values, values])
    order = progressive_mmr(relevance.repeat(2), keys, values, torch.tensor([0, 60]), torch.tensor([30]), chunk=16)
    assert (order[0] % 30).unique().numel() == 30


def test_without_duplication_it_is_top_k():
    relevance, keys, values, offsets = case((123,), seed=6)
    order = progressive_mmr(relevance, keys, values, offsets, torch.tensor([40]), duplication=0.0)
    assert set(order[0].tolist()) == set(relevance.topk(40).indices.tolist())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_strides(dtype):
    relevance, keys, values, offsets = case((90, 33), seed=7)
    counts = torch.tensor([20, 5])
    keys, values = keys.to(dtype), values.to(dtype)
    expected = naive(relevance, keys.float(), values.float(), offsets, counts)
    assert_order(progressive_mmr(relevance, keys, values, offsets, counts), expected, offsets, counts)
    order = progressive_mmr(strided(relevance), strided(keys), strided(values), offsets, counts)
    assert torch.equal(order, expected)


def test_broken_numbers_still_give_the_budget():
    relevance, keys, values, offsets = case((50,), seed=9)
    relevance[:40] = torch.nan
    relevance[40:45] = -torch.inf
    order = progressive_mmr(relevance, keys, values, offsets, torch.tensor([30]))
    assert order[0].unique().numel() == 30
    assert set(range(45, 50)) <= set(order[0].tolist())


def test_closest_other_is_the_largest_off_diagonal_similarity():
    _, keys, values, offsets = case((300, 1, 20), seed=13)
    found = closest_other(keys, values, offsets)
    for start, stop in ((0, 300), (301, 321)):
        everything = torch.arange(stop - start)
        full = Duplication(keys[start:stop], values[start:stop])(everything, everything)
        torch.testing.assert_close(found[start:stop], full.fill_diagonal_(-torch.inf).amax(1), atol=1e-6, rtol=0)
    assert found[300] == -torch.inf


def test_large_shared_bias_does_not_blur_the_distances():
    relevance, keys, values, offsets = case((100,), seed=11)
    counts = torch.tensor([30])
    expected = naive(relevance.double(), keys, values, offsets, counts)
    assert torch.equal(progressive_mmr(relevance, keys + 60, values, offsets, counts), expected)


@pytest.mark.parametrize("length", [4, 12, 30])
def test_long_keys_do_not_blur_the_distances(length):
    """Keys of similar rows are much longer than their distances."""
    _, keys, values, _ = case((60,), key_size=32)
    keys = length * keys[torch.arange(60) % 7] + 0.3 * keys
    k, unit = keys.double(), torch.nn.functional.normalize(values.double(), dim=-1)
    distance = (k[:, None] - k).square().sum(-1) / (2 * 32**0.5)
    expected = (torch.einsum("igd,jgd->ijg", unit, unit) * torch.exp(-distance)).mean(-1)
    everything = torch.arange(60)
    similarity = Duplication(keys, values)
    for found in (similarity(everything, everything), similarity.all_pairs()):
        torch.testing.assert_close(found.double(), expected, atol=2e-6, rtol=0)
