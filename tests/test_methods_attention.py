# SPDX-License-Identifier: Apache-2.0
"""Methods that read the decoder's attention, and the controls `random` and `uniform`, on ragged batches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from ragged_prompts import BUDGETS, GROUPS, HEADS, RAGGED, SIZE, offsets, sample, tokens
from torch import nn

from vtprune import methods
from vtprune.core.schedule import scale_layer, scale_schedule
from vtprune.core.spread import spread, spread_grid
from vtprune.core.taps import over_prompt
from vtprune.errors import MethodError
from vtprune.methods.dart import duplication_aware
from vtprune.methods.sparsevlm.recycling import density_peaks, recycle, recycled, split_budget
from vtprune.methods.transprune import submodule, variation

PARTS = ("states", "queries", "keys", "changes")  # of a sample, one row per token
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
    assert [int(part.sum()) for part in keep.split(batch.offsets.diff().tolist())] == budgets


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
    assert spread(torch.ones(12, dtype=torch.int64), 4).nonzero().flatten().tolist() == [1, 4, 7, 10]
    for lengths in ((1, 1, 6), (6, 1, 1), (1, 6, 1), (9, 1, 1, 1, 1, 9)):  # also where the used rows are short
        rows = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        assert all(int(spread_grid(rows, k).sum()) == k for k in range(len(rows) + 1))


def test_uniform_takes_tokens_without_a_place_by_index() -> None:
    batch = tokens([sample(1, 0, 1, 12, 1)], [4])
    batch.grid_row, batch.grid_col = torch.full((12,), -1), torch.full((12,), -1)
    assert methods.Uniform().choose(batch).keep.nonzero().flatten().diff().tolist() == [3, 3, 3]


def test_dart_takes_what_resembles_the_pivots_least() -> None:
    hidden = torch.eye(6) + 0.01
    hidden[4] = hidden[0]  # a duplicate of the pivot
    size = torch.tensor([9.0, 1, 1, 1, 1, 1])
    empty = (hidden[:0], size[:0], torch.tensor([0, 0]))
    keep = duplication_aware(hidden, size, torch.tensor([0, 6]), torch.tensor([5]), *empty, pivots=1)
    assert keep.tolist() == [True, True, True, True, False, True]
    text = hidden[2:3] + hidden[3:4] + hidden[0:1] / 2  # picks second; similar to all remaining tokens but the last
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


def test_recycled_tokens_are_means_in_the_columns_of_their_centers() -> None:
    g = torch.Generator().manual_seed(0)
    hidden, scores = torch.randn(200, 4, generator=g), torch.rand(200, generator=g)
    kept, clusters = split_budget(200, 60)
    keep, merged = recycle(hidden, scores, scores, torch.tensor([0, 200]), torch.tensor([60]))
    order = scores.argsort(descending=True)
    best, members = order[:kept], order[kept : kept + recycled(200 - kept)[0]]
    assert keep[best].all() and torch.equal(merged[best], hidden[best])
    group, centers = density_peaks(hidden[members], clusters)
    assert set(members[centers].tolist()) == set(keep.nonzero().flatten().tolist()) - set(best.tolist())
    for c in range(clusters):
        torch.testing.assert_close(merged[members[centers[c]]], hidden[members[group == c]].mean(0))


def test_density_peaks_finds_separate_clusters() -> None:
    g = torch.Generator().manual_seed(0)
    truth = torch.arange(3).repeat(8)
    x = torch.randn(24, 5, generator=g) * 0.05 + torch.eye(3, 5)[truth] * 4
    group, centers = density_peaks(x, 3)
    assert sorted(truth[centers].tolist()) == [0, 1, 2] and torch.equal(truth[centers][group], truth)


def test_density_peaks_is_what_it_says() -> None:
    x = torch.rand(30, 4, generator=torch.Generator().manual_seed(2))
    distance = [[float((a - b).norm()) / 2 for b in x] for a in x]  # the root of the width is 2
    density = [torch.tensor(sorted(row)[:5]).square().mean().neg().exp().item() for row in distance]
    longest = max(map(max, distance))
    gap = [
        min([d for j, d in enumerate(row) if density[j] > density[i]] or [longest]) for i, row in enumerate(distance)
    ]
    centers = sorted(range(30), key=lambda i: -gap[i] * density[i])[:5]
    group, found = density_peaks(x, 5)
    assert found.tolist() == centers
    assert group.tolist() == [min(range(5), key=lambda c: distance[i][centers[c]]) for i in range(30)]


def test_density_peaks_of_duplicates() -> None:
    x = torch.zeros(6, 5)
    x[3:] = 4.0
    group, centers = density_peaks(x, 2)  # all are equally dense: the first of each kind is a center
    assert centers.tolist() == [0, 3] and group.tolist() == [0, 0, 0, 1, 1, 1]
    group, centers = density_peaks(x, 3)  # more clusters than kinds: every cluster still has a member
    assert sorted(torch.bincount(group, minlength=3).tolist()) == [1, 2, 3]


def test_sparsevlm_scores_by_the_words_that_see_the_image() -> None:
    s = RAGGED[0]
    keys = s.keys.repeat_interleave(HEADS // GROUPS, 1)  # [C, H, dh]
    visual, text = s.states[s.before : s.before + s.count], s.states[-s.after :]
    rating = (visual @ text.T).softmax(-1).mean(0)
    rows = (s.length - s.after + torch.arange(s.after))[rating > rating.mean()]
    assert 0 < len(rows) < s.after
    logits = torch.einsum("rhd,chd->hrc", s.queries[rows], keys).mul(SIZE**-0.5)
    seen = torch.arange(s.length) <= rows[:, None]
    attention = logits.masked_fill(~seen, -torch.inf).softmax(-1)[..., s.before : s.before + s.count]  # [H, r, n]
    torch.testing.assert_close(methods.SparseVLM().choose(tokens([s], [7])).scores, attention.mean((0, 1)))

    distance = rows[:, None] - torch.arange(s.before, s.before + s.count)
    theta = 10000.0 ** (-torch.arange(SIZE // 2) / (SIZE // 2))
    divisor = 2 * torch.cos(distance[..., None] * theta).sum(-1) / SIZE**0.5
    assert divisor.min() < 0.3 * SIZE**0.5  # at long distances the released divisor is small or negative
    corrected = attention / divisor.clamp_min(0.3 * SIZE**0.5)
    best = corrected.sum((1, 2)).topk(3).indices  # 14/32 of 6 heads
    plus = methods.SparseVLM(version=2, floor=0.3)
    batch = tokens([s], [7])
    choice = plus.choose(batch)
    torch.testing.assert_close(choice.scores, corrected[best].mean((0, 1)))

    # Later cuts measure distances in the unpruned prompt.
    assert torch.equal(batch.memory["sparsevlm.place"], s.before + choice.keep.nonzero().flatten())
    far = replace(s, rows=1, cols=7)
    later = tokens(
        [replace(far, **{n: getattr(s, n)[[*range(10), *range(s.length - 6, s.length)]] for n in PARTS})], [3]
    )
    later.memory = batch.memory
    moved = plus.choose(later).scores
    later.memory = {}
    assert not torch.allclose(moved, plus.choose(later).scores)


def test_dart_reads_keys_before_rotation_unless_asked() -> None:
    for rope in (False, True):
        batch, asked = tokens(RAGGED, BUDGETS), []
        read = batch.reader
        batch.reader = lambda *args, asked=asked, read=read: asked.append(args[1:3]) or read(*args)
        methods.DART(rope=rope).choose(batch)
        assert asked == [(1, rope)]


def test_taps_are_read_where_padding_was_taken_away_after_them() -> None:
    batch = tokens(RAGGED, BUDGETS)
    assert batch.prompt is not None
    before = over_prompt(batch.recorded["dart.states"][0], batch)
    assert torch.equal(before, torch.cat([s.states for s in RAGGED]))
    batch.prompt.slot -= 2  # all samples are padded on the left by two columns more than needed
    assert torch.equal(over_prompt(batch.recorded["dart.states"][0], batch), before)
    assert torch.equal(over_prompt(batch.recorded["dart.states"][0][:, 2:], batch), before)


def test_transprune_adds_up_over_stages() -> None:
    method, batch = methods.TransPrune(alpha=1.0), tokens(RAGGED, [10, 30, 3, 12])
    prompt = batch.prompt
    assert prompt is not None
    parts = [r[prompt.batch, prompt.slot] for r in batch.recorded["transprune.change"]]
    ttv = sum(variation(p, prompt.offsets)[prompt.visual] for p in parts)
    keep = method.choose(batch).keep
    torch.testing.assert_close(batch.memory["transprune.ttv"], ttv[keep])
    for s, mine in enumerate(ttv.split(batch.offsets.diff().tolist())):
        kept = keep[batch.sample == s]
        assert mine[kept].min() >= mine[~kept].max() if (~kept).any() else True
    # At the next stage nothing new was recorded, so only the sum so far counts.
    counts = [10, 30, 3, 12]
    later = tokens([sample(s, 1, 1, n, 2) for s, n in enumerate(counts)], [5, 9, 2, 4], stage=1)
    later.memory, later.recorded = batch.memory, batch.recorded
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


def test_two_clusters_have_the_closest_pair_as_centers() -> None:
    """With two clusters the closest pair is the densest, and neither of the two is denser than the other."""
    for seed in range(10):
        x = torch.randn(13, 24, generator=torch.Generator().manual_seed(seed))
        distance = torch.cdist(x.double(), x.double()).fill_diagonal_(torch.inf)
        _, centers = density_peaks(x, 2)
        assert sorted(centers.tolist()) == sorted(divmod(int(distance.argmin()), 13))
    assert density_peaks(torch.ones(20, 4), 3)[1].tolist() == [0, 1, 2]  # equal rows: the earlier one is denser


@pytest.mark.parametrize("budget", [1, 2, 3])
def test_dart_always_has_its_pivots_as_released(budget: int) -> None:
    g = torch.Generator().manual_seed(0)
    x, size, text, text_size = (torch.randn(*n, generator=g) for n in ((25, 8), (25,), (6, 8), (6,)))
    sizes = torch.tensor([0, 25]), torch.tensor([budget]), text, text_size, torch.tensor([0, 6])
    assert int(duplication_aware(x, size, *sizes, exact=False).sum()) == 4
    assert int(duplication_aware(x, size, *sizes).sum()) == budget
