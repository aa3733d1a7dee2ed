# SPDX-License-Identifier: Apache-2.0
"""Methods that read the decoder's attention, and the two controls, on hand-built ragged batches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from ragged_prompts import BUDGETS, GROUPS, HEADS, RAGGED, SIZE, offsets, sample, tokens
from torch import nn

from vtprune import methods
from vtprune.errors import MethodError
from vtprune.methods.dart import duplication_aware
from vtprune.methods.depth import scale_layer, scale_schedule
from vtprune.methods.recycling import density_peaks, recycle, recycled, split_budget
from vtprune.methods.transprune import submodule, variation
from vtprune.methods.uniform import spread, spread_grid

METHODS = {
    "random": methods.Random(),
    "uniform": methods.Uniform(),
    "fastv": methods.FastV(),
    "pyramiddrop": methods.PyramidDrop(),
    "sparsevlm": methods.SparseVLM(),
    "sparsevlm_plus": methods.SparseVLM(version=2),
    "transprune": methods.TransPrune(),
    "transprune_paper": methods.TransPrune(support="visual", direction="absolute"),
    "dart": methods.DART(),
    "debiased": methods.Debiased(),
    "debiased_sparsevlm": methods.Debiased(methods.SparseVLM(), recycle="raw"),
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())


@every_method
@pytest.mark.parametrize("budgets", [BUDGETS, [1, 1, 1, 1], [20, 49, 3, 12], [19, 48, 1, 2]], ids=str)
def test_budget_is_exact(method: methods.Method, budgets: list[int]) -> None:
    batch = tokens(RAGGED, budgets)
    keep = method.choose(batch).keep
    assert keep.dtype == torch.bool
    assert [int(part.sum()) for part in keep.split(batch.segments.diff().tolist())] == budgets


@every_method
@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_sample_in_batch_is_sample_alone(method: methods.Method, left: bool) -> None:
    together = method.choose(tokens(RAGGED, BUDGETS, left))
    edges = offsets([s.count for s in RAGGED]).tolist()
    for s, budget, start, end in zip(RAGGED, BUDGETS, edges[:-1], edges[1:], strict=True):
        alone = method.choose(tokens([s], [budget]))
        assert torch.equal(together.keep[start:end], alone.keep)
        if alone.hidden is not None:
            assert together.hidden is not None
            torch.testing.assert_close(together.hidden[start:end][alone.keep], alone.hidden[alone.keep])


@every_method
def test_grouped_heads_are_repeated_heads(method: methods.Method) -> None:
    repeated = [replace(s, keys=s.keys.repeat_interleave(HEADS // GROUPS, 1)) for s in RAGGED]
    assert torch.equal(method.choose(tokens(RAGGED, BUDGETS)).keep, method.choose(tokens(repeated, BUDGETS)).keep)


@pytest.mark.parametrize("name", ["fastv", "pyramiddrop", "sparsevlm_plus", "transprune", "dart"])
def test_ties_go_to_the_smaller_column(name: str) -> None:
    plain = replace(
        RAGGED[0],
        states=torch.ones_like(RAGGED[0].states),
        keys=torch.ones_like(RAGGED[0].keys),
        changes=torch.ones_like(RAGGED[0].changes),
    )
    method = replace(METHODS[name], floor=1.0) if name == "sparsevlm_plus" else METHODS[name]
    keep = method.choose(tokens([plain], [7])).keep
    assert keep.nonzero().flatten().tolist() == list(range(7))


def test_fastv_and_pyramiddrop_rank_by_the_last_row() -> None:
    s = RAGGED[0]
    keys = s.keys.repeat_interleave(HEADS // GROUPS, 1)  # [C, H, dh]
    attention = torch.einsum("hd,chd->hc", s.queries[-1], keys).mul(SIZE**-0.5).softmax(-1).mean(0)
    expected = attention[s.before : s.before + s.count]
    for method in (methods.FastV(), methods.PyramidDrop()):
        scores = method.choose(tokens([s], [5])).scores
        assert scores is not None
        torch.testing.assert_close(scores, expected)


def test_fastv_at_layer_zero_is_random() -> None:
    batch = tokens(RAGGED, BUDGETS, layer=0)
    assert torch.equal(methods.FastV(layer=0, seed=5).choose(batch).keep, methods.Random(seed=5).choose(batch).keep)


def test_random_has_its_own_generator() -> None:
    state = torch.random.get_rng_state()
    first, other = (methods.Random(seed=s).choose(tokens(RAGGED, BUDGETS)).keep for s in (0, 1))
    assert torch.equal(state, torch.random.get_rng_state())
    assert not torch.equal(first, other)


def test_uniform_spreads_over_rows_and_columns() -> None:
    rows = torch.arange(24).repeat_interleave(24)
    picked = spread_grid(rows, 64).view(24, 24)
    assert picked.any(1).sum() == picked.any(0).sum() == 8
    assert set(picked.any(1).nonzero().flatten().diff().tolist()) == {3}
    for n in range(1, 40):
        for k in range(n + 1):
            marks = spread(torch.ones(n, dtype=torch.int64), k)
            assert marks.sum() == k and marks.max() <= 1
            gaps = marks.nonzero().flatten().diff()
            assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1
    short_rows = torch.tensor([0, 1, 2, 2, 2, 2, 2, 2])  # nearly all cells in one row
    assert all(int(spread_grid(short_rows, k).sum()) == k for k in range(1, 9))


def test_uniform_takes_tokens_without_a_place_by_index() -> None:
    batch = tokens([sample(1, 0, 1, 12, 1)], [4])
    batch.row, batch.col = torch.full((12,), -1), torch.full((12,), -1)
    assert methods.Uniform().choose(batch).keep.nonzero().flatten().diff().tolist() == [3, 3, 3]


def test_dart_takes_what_resembles_the_pivots_least() -> None:
    hidden = torch.eye(6) + 0.01
    hidden[4] = hidden[0]  # a duplicate of the pivot
    size = torch.tensor([9.0, 1, 1, 1, 1, 1])
    empty = (hidden[:0], size[:0], torch.tensor([0, 0]))
    keep = duplication_aware(hidden, size, torch.tensor([0, 6]), torch.tensor([5]), *empty, pivots=1)
    assert keep.tolist() == [True, True, True, True, False, True]
    text = hidden[2:3] + hidden[3:4] + hidden[0:1] / 2  # takes second, and resembles all that are left but the last
    keep = duplication_aware(
        hidden, size, torch.tensor([0, 6]), torch.tensor([3]), text, size[:1], torch.tensor([0, 1]), pivots=1
    )
    assert keep.tolist() == [True, True, False, False, False, True]
    released = duplication_aware(hidden, size, torch.tensor([0, 6]), torch.tensor([3]), *empty, pivots=1, exact=False)
    assert int(released.sum()) == 1 + 3 // 2


@pytest.mark.parametrize("total", [1, 2, 5, 29, 30, 31, 243, 576, 700])
def test_recycling_splits_every_budget(total: int) -> None:
    for budget in range(1, total + 1):
        kept, clusters = split_budget(total, budget)
        assert kept + clusters == budget and kept >= 1 and 0 <= clusters <= total - kept
        assert clusters == recycled(total - kept)[1] or clusters == budget // 2
    assert split_budget(total, total) == (total, 0)


def test_recycled_tokens_are_means_in_the_columns_of_their_centres() -> None:
    g = torch.Generator().manual_seed(0)
    hidden, scores = torch.randn(200, 4, generator=g), torch.rand(200, generator=g)
    kept, clusters = split_budget(200, 60)
    keep, merged = recycle(hidden, scores, scores, torch.tensor([0, 200]), torch.tensor([60]))
    order = scores.argsort(descending=True)
    best, members = order[:kept], order[kept : kept + recycled(200 - kept)[0]]
    assert keep[best].all() and torch.equal(merged[best], hidden[best])
    group, centres = density_peaks(hidden[members], clusters)
    assert set(members[centres].tolist()) == set(keep.nonzero().flatten().tolist()) - set(best.tolist())
    for c in range(clusters):
        torch.testing.assert_close(merged[members[centres[c]]], hidden[members[group == c]].mean(0))


def test_density_peaks_finds_separate_clusters_and_is_deterministic() -> None:
    g = torch.Generator().manual_seed(0)
    truth = torch.arange(3).repeat(8)
    x = torch.randn(24, 5, generator=g) * 0.05 + torch.eye(3, 5)[truth] * 4
    group, centres = density_peaks(x, 3)
    assert sorted(truth[centres].tolist()) == [0, 1, 2] and torch.equal(truth[centres][group], truth)
    same = torch.zeros(6, 5)  # all equally dense: the first row is the densest, the others are its duplicates
    assert density_peaks(same, 2)[1].tolist() == density_peaks(same, 2)[1].tolist() == [0, 1]


def test_transprune_adds_up_over_stages() -> None:
    method, batch = methods.TransPrune(alpha=1.0), tokens(RAGGED, [10, 30, 3, 12])
    prompt = batch.prompt
    assert prompt is not None
    parts = [r[prompt.batch, prompt.column] for r in batch.observed["transprune.change"]]
    ttv = sum(variation(p, prompt.segments)[prompt.visual] for p in parts)
    keep = method.choose(batch).keep
    torch.testing.assert_close(batch.memory["transprune.ttv"], ttv[keep])
    for s, mine in enumerate(ttv.split(batch.segments.diff().tolist())):
        kept = keep[batch.sample == s]
        assert mine[kept].min() >= mine[~kept].max() if (~kept).any() else True
    # At the next stage nothing new was recorded, so only the sum so far counts.
    counts = [10, 30, 3, 12]
    later = tokens([sample(s, 1, 1, n, 2) for s, n in enumerate(counts)], [5, 9, 2, 4], stage=1)
    later.memory, later.observed = batch.memory, batch.observed
    again = method.choose(later).keep
    for s, mine in enumerate(ttv[keep].split(counts)):
        assert set(mine[again[later.sample == s]].tolist()) == set(mine.sort().values[-[5, 9, 2, 4][s] :].tolist())


def test_transprune_finds_attention_and_mlp_by_structure() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.input_layernorm, self.post_attention_layernorm = nn.LayerNorm(4), nn.LayerNorm(4)
            self.attention_dropout = nn.Dropout()
            self.self_attention, self.block_sparse_moe = nn.Linear(4, 4), nn.Linear(4, 4)

    layer = Layer()
    assert submodule(layer, "attention") is layer.self_attention
    assert submodule(layer, "mlp") is layer.block_sparse_moe
    assert submodule(nn.LayerNorm(4), "mlp") is None


def test_published_layers_are_scaled() -> None:
    assert [s.layer for s in methods.PyramidDrop().schedule(32)] == [8, 16, 24]
    assert [s.layer for s in methods.TransPrune().schedule(28)] == [6, 8, 11]
    assert [(s.layer, s.share) for s in methods.TransPrune().schedule(2)] == [(1, 0.125)]
    assert [s.layer for s in methods.SparseVLM().schedule(32)] == [3, 7, 16]
    assert scale_layer(2, None, 1) == 0 and methods.FastV().schedule(1)[0].layer == 0
    for depth in range(1, 60):
        for stages in (m.schedule(depth) for m in METHODS.values()):
            layers = [s.layer for s in stages]
            assert layers == sorted(set(layers)) and layers[0] >= 0 and layers[-1] < depth
    with pytest.raises(MethodError, match="one share per layer"):
        scale_schedule((1, 2), (0.5,), 32, 32, "PyramidDrop")
