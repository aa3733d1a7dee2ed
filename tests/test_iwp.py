# SPDX-License-Identifier: Apache-2.0
"""IWP: its formulas and its selection."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_tokens import Sample, tokens

from vtprune.errors import MethodError
from vtprune.methods import resolve
from vtprune.methods.iwp.method import IWP, Candidates
from vtprune.methods.iwp.query_free import query_free_magnitude


def rotate(x, first=0):
    """Rotary embedding, half-split, positions `first..` along the last but one dimension."""
    half = x.shape[-1] // 2
    angle = torch.arange(first, first + x.shape[-2])[:, None] * 10000.0 ** (-torch.arange(half) / half)
    cos, sin = angle.cos().repeat(1, 2).to(x.dtype), angle.sin().repeat(1, 2).to(x.dtype)
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def sample(count=60, text=5, heads=4, groups=2, size=16, seed=0, before=3):
    g = torch.Generator().manual_seed(seed)
    length = before + count + text
    centers = torch.randn(8, groups, size, generator=g)
    which = torch.randint(8, (length,), generator=g).sort().values
    keys = (centers[which] + 0.3 * torch.randn(length, groups, size, generator=g)).transpose(0, 1)
    values = (centers.flip(0)[which] + 0.3 * torch.randn(length, groups, size, generator=g)).transpose(0, 1)
    queries = torch.randn(heads, text, size, generator=g)
    rotated = rotate(queries, length - text)
    return Sample(queries, keys, values, before, count, rotate(keys), rotated)


def kept(method, samples, budgets, image=None):
    batch = tokens(samples, budgets, image)
    keep = method.choose(batch).keep
    assert keep.dtype == torch.bool
    counts = torch.zeros(len(samples), dtype=torch.int64).scatter_add(0, batch.sample, keep.long())
    assert counts.tolist() == budgets
    return keep.split([s.count for s in samples])


def test_is_registered_and_clamps_its_layer_to_shallow_decoders():
    assert isinstance(resolve("iwp"), IWP)
    assert [IWP().schedule(n)[0].layer for n in (28, 3, 2, 1)] == [3, 2, 1, 0]
    assert IWP(layer=8).schedule(4)[0].layer == 3


@pytest.mark.parametrize(
    "options",
    [
        {"query": "mean"},
        {"reduce": "median"},
        {"relevance": "max"},
        {"objective": "quadratic"},
        {"duplication": 1.5},
        {"layer": -1},
        {"chunk": 0},
    ],
    ids=str,
)
def test_bad_options_are_refused_by_name(options):
    with pytest.raises(MethodError, match=next(iter(options))):
        IWP(**options)


def test_rotation_changes_neither_norms_nor_the_query_free_magnitude():
    s = sample()
    torch.testing.assert_close(s.rotated_keys.norm(dim=-1), s.keys.norm(dim=-1))
    plain, rotated = (IWP(rope_in_duplication=rope).candidates(tokens([s], [10])) for rope in (False, True))
    assert torch.equal(plain.relevance, rotated.relevance)  # the magnitude does not depend on positions
    assert not torch.allclose(plain.keys, rotated.keys)
    turned = IWP(rope_in_magnitude=True).candidates(tokens([s], [10]))
    assert not torch.allclose(turned.relevance, rotated.relevance)


def test_relevance_ignores_where_the_image_stands():
    """Moving all tokens by some positions changes no relevance."""
    s = sample()
    moved = Sample(s.queries, s.keys, s.values, s.start, s.count, rotate(s.keys, 7), rotate(s.queries, 7))
    first, second = (IWP().candidates(tokens([x], [10])).relevance for x in (s, moved))
    assert torch.equal(first, second)


@pytest.mark.parametrize("relevance", ["linear", "log", "rank"])
def test_without_duplication_it_is_top_k(relevance):
    s = sample(seed=1)
    method = IWP(duplication=0, relevance=relevance)
    batch = tokens([s], [20])
    scores = method.candidates(batch).relevance
    expected = scores.topk(20).indices
    assert set(method.choose(batch).keep.nonzero().flatten().tolist()) == set(expected.tolist())


@pytest.mark.parametrize("count", [1, 2, 17])
def test_full_budget_keeps_everything(count):
    assert kept(IWP(), [sample(count)], [count])[0].all()
    assert kept(IWP(), [sample(count)], [1])[0].sum() == 1


@given(st.integers(0, 10**6), st.integers(1, 60), st.sampled_from([0.25, 0.5, 1.0]))
@settings(max_examples=25, deadline=None)
def test_chunk_of_one_is_exact_greedy_for_any_pool(seed, budget, duplication):
    s = sample(seed=seed)
    first, second = (kept(IWP(chunk=1, pool_factor=b, duplication=duplication), [s], [budget])[0] for b in (1, 4))
    assert torch.equal(first, second)


def doubled(count, seed):
    """A sample with every visual token twice and no other duplicates."""
    s = sample(count, seed=seed)
    keys, values = (
        torch.cat([x[:, : 3 + count], x[:, 3 : 3 + count], x[:, 3 + count :]], 1) for x in (4 * s.keys, s.values)
    )
    return Sample(s.queries / 4, keys, values, 3, 2 * count)


def test_duplicates_are_not_kept_while_others_are_worth_more():
    s = doubled(40, seed=3)
    keep = kept(IWP(duplication=1.0, relevance="rank"), [s], [20])[0]
    assert not (keep[:40] & keep[40:]).any()
    blind = kept(IWP(duplication=0), [s], [20])[0]
    assert (blind[:40] == blind[40:]).all()


@pytest.mark.parametrize("objective", ["linear", "log"])
def test_rounding_of_logarithms_does_not_rank_copies(objective, monkeypatch):
    """Magnitudes are logarithms in float32; between 8 and 16 they have steps of 1e-6."""
    s, logs = doubled(40, seed=4), torch.linspace(-15, -8.1, 40)
    logs = torch.cat([torch.nextafter(logs, torch.tensor(-torch.inf)), logs])
    monkeypatch.setattr("vtprune.methods.iwp.method.rank1_relevance", lambda *inputs: logs)
    for budget in (1, 7, 21, 35):
        keep = kept(IWP(duplication=0, objective=objective), [s], [budget])[0]
        assert not (keep[40:] & ~keep[:40]).any()


def test_a_sample_in_a_batch_is_chosen_as_alone():
    samples = [sample(60, 5, seed=4), sample(7, 1, seed=5, before=0), sample(100, 9, seed=6)]
    budgets = [12, 3, 40]
    together = kept(IWP(), samples, budgets)
    for s, budget, mine in zip(samples, budgets, together, strict=True):
        assert torch.equal(kept(IWP(), [s], [budget])[0], mine)


def test_last_token_query_differs_and_text_free_prompts_have_only_it():
    s = sample(seed=10)
    mean, last = (IWP(query=q).candidates(tokens([s], [9])).relevance for q in ("instruction_mean", "last"))
    assert not torch.allclose(mean, last)
    s = sample(text=1, seed=10)
    mean, last = (IWP(query=q).candidates(tokens([s], [9])).relevance for q in ("instruction_mean", "last"))
    assert torch.equal(mean, last)


def test_log_relevance_of_equal_tokens_is_one():
    s = sample(1)
    assert IWP(relevance="log").candidates(tokens([s], [1])).relevance.tolist() == [1.0]
    assert IWP(relevance="rank").candidates(tokens([s], [1])).relevance.tolist() == [1.0]


def test_statistics_are_logged_for_debugging_only(caplog):
    batch = tokens([sample()], [9])
    with caplog.at_level(logging.INFO, "vtprune"):
        IWP().choose(batch)
    assert not caplog.records
    with caplog.at_level(logging.DEBUG, "vtprune"):
        IWP().choose(batch)
    assert "closest_similarity" in caplog.text
    numbers = IWP().statistics(batch)
    assert 0 < numbers["relevance"] <= 1 and 0 < numbers["closest_similarity"] <= 1


def query_free_by_formula(keys, values, offsets, scaling, reduce):
    """The query-free magnitude, pool by pool in double precision."""
    out = []
    for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        k, v = keys[start:end].double(), values[start:end].double()
        size = (k.norm(dim=-1) ** 2 * scaling / 2).exp()
        heads = size / size.sum(0) * v.norm(dim=-1)  # [n, G]
        joined = {"mean": heads.mean(1), "rms": (heads**2).mean(1).sqrt(), "max": heads.amax(1)}
        out.append(joined[reduce])
    return torch.cat(out)


@pytest.mark.parametrize("reduce", ["mean", "rms", "max"])
def test_query_free_magnitude_is_its_formula(reduce):
    g = torch.Generator().manual_seed(3)
    keys, values = torch.randn(23, 2, 8, generator=g), torch.randn(23, 2, 6, generator=g)
    offsets = torch.tensor([0, 1, 9, 23])
    found = query_free_magnitude(keys, values, offsets, 8**-0.5, reduce)
    wanted = query_free_by_formula(keys, values, offsets, 8**-0.5, reduce)
    torch.testing.assert_close(found.double().exp(), wanted, rtol=1e-5, atol=1e-7)


def test_query_free_magnitude_survives_lengths_whose_exponential_does_not():
    keys = torch.full((4, 1, 16), 30.0) * torch.tensor([1.0, 1.01, 0.9, 1.0])[:, None, None]  # |k|^2 / 2 sqrt(d) ~ 1800
    found = query_free_magnitude(keys, torch.ones(4, 1, 16), torch.tensor([0, 4]), 0.25)
    assert torch.isfinite(found).all() and found.argmax() == 1 and found[0] == found[3] > found[2]


def test_without_a_query_neither_text_nor_places_matter():
    """`query="none"`: the question does not change the selection, nor rotation the relevance."""
    one = sample()
    other = dataclasses.replace(one, queries=one.queries.flip(-1), rotated_queries=one.rotated_queries.flip(-1))
    method = IWP(query="none", duplication=0.0)
    assert torch.equal(kept(method, [one], [12])[0], kept(method, [other], [12])[0])
    batch = tokens([one], [12])
    plain, rotated = IWP(query="none", rope_in_duplication=False), IWP(query="none", rope_in_duplication=True)
    torch.testing.assert_close(
        plain.candidates(batch).relevance, rotated.candidates(batch).relevance, rtol=1e-4, atol=1e-6
    )


def test_statistics_are_medians_of_an_even_number_of_tokens_too():
    axes = torch.eye(4)[:, None]
    rows = Candidates(torch.tensor([0.0, 1, 2, 4]), axes, axes, 1.0, torch.tensor([0, 4]))
    assert IWP().statistics(None, rows)["relevance"] == 1.5
