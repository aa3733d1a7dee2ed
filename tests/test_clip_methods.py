# SPDX-License-Identifier: Apache-2.0
"""Clip methods on synthetic clips: exact budgets, frames of unequal length, and properties stated in the papers."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

import vtprune
from vtprune.core.clips import Clip, ClipMethod, cut_segments
from vtprune.core.density_peaks import density_peaks, log_peak_scores, pairwise_distances
from vtprune.core.frame_budget import frame_budgets
from vtprune.methods.dycoke import DyCoke
from vtprune.methods.evs import EVS
from vtprune.methods.fastvid import FastVID, plan, summarize
from vtprune.methods.flashvid import FlashVID, diverse, tree_links, tree_means
from vtprune.methods.holitom import HoliTom, fold, next_similarity, split
from vtprune.methods.vcast import VCast, curvature, unit_means
from vtprune.methods.vidcom2 import VidCom2

SELECTING = (EVS, VCast, VidCom2, DyCoke)
MERGING = (FastVID, HoliTom, FlashVID)
FOR_CLIPS = (*SELECTING, *MERGING)
# The third frame lacks the places of the last row, the fourth has one token only.
UNEQUAL = Clip(
    torch.tensor([0] * 12 + [1] * 12 + [2] * 8 + [3] + [4] * 12 + [5] * 12),
    torch.cat([torch.arange(n) for n in (12, 12, 8, 1, 12, 12)]),
)


def rows(count: int, width: int = 24, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def still_clip(frames: int, places: int, noise: float = 0.01) -> tuple[Tensor, Clip]:
    """One picture, again and again, with a little noise."""
    picture, moved = rows(places), noise * rows(frames * places, seed=1)
    return picture.repeat(frames, 1) + moved, Clip.of_grid(frames, places)


def attention_of(clip: Clip) -> Tensor:
    return torch.rand(len(clip.frame), generator=torch.Generator().manual_seed(7))


def least_budget(method: ClipMethod, clip: Clip) -> int:
    """What a method that keeps whole frames cannot do without."""
    return {EVS: clip.sizes[0], DyCoke: sum(clip.sizes[::4])}.get(type(method), 1)


@pytest.mark.parametrize(
    ("weights", "total", "capacity", "floor", "expected"),
    [
        ([1, 1, 1], 7, [9, 9, 9], 0, [3, 2, 2]),  # ties: the earlier frame
        ([0, 0, 0], 6, [9, 9, 9], 0, [2, 2, 2]),  # no weights: equal
        ([2, 1, 1], 10, [9, 9, 9], 0, [5, 3, 2]),
        ([8, 1, 1], 10, [4, 9, 9], 0, [4, 3, 3]),  # what a full frame cannot take goes round
        ([1, 0, 0], 5, [9, 9, 9], 1, [3, 1, 1]),
        ([1, 2, 3], 2, [9, 9, 9], 1, [0, 1, 1]),  # fewer than the floors: none
        ([1, 1, 1], 99, [4, 2, 3], 1, [4, 2, 3]),
        ([5, 5], 3, [1, 9], 2, [1, 2]),  # a floor ends where the frame does
        ([1, 1], 5, [9, 9], [0, 3], [1, 4]),
        ([], 0, [], 0, []),
    ],
)
def test_frame_budgets(weights: list, total: int, capacity: list, floor: Any, expected: list) -> None:
    assert frame_budgets(weights, total, capacity, floor) == expected


def test_frame_budgets_are_exact() -> None:
    draw = torch.Generator().manual_seed(3)
    for _ in range(500):
        frames = int(torch.randint(1, 9, (), generator=draw))
        capacity = torch.randint(0, 12, (frames,), generator=draw).tolist()
        weights = (torch.rand(frames, generator=draw) * torch.randint(0, 2, (frames,), generator=draw)).tolist()
        floor, total = (int(torch.randint(0, top, (), generator=draw)) for top in (4, 80))
        counts = frame_budgets(weights, total, capacity, floor)
        assert sum(counts) == min(total, sum(capacity))
        assert all(0 <= k <= c for k, c in zip(counts, capacity, strict=True))
        if sum(min(floor, c) for c in capacity) <= total:
            assert all(k >= min(floor, c) for k, c in zip(counts, capacity, strict=True))


CLIPS = {
    "grid": Clip.of_grid(7, 12),
    "two_frames": Clip.of_grid(2, 9),
    "unequal": UNEQUAL,
    "picture": Clip.of_grid(1, 20),
    "one_place": Clip.of_grid(9, 1),
}
CONTENT = {
    "noise": lambda n: rows(n),
    "equal": lambda n: torch.ones(n, 24),
    "zeros": lambda n: torch.zeros(n, 24),
    "drift": lambda n: rows(1) + 0.02 * rows(n, seed=1).cumsum(0),
    "long": lambda n: 300 * rows(n),  # densities below what float32 can hold
}


@pytest.mark.parametrize("content", CONTENT)
@pytest.mark.parametrize("shape", CLIPS)
@pytest.mark.parametrize("kind", FOR_CLIPS, ids=lambda kind: kind.name)
def test_every_budget_is_met(kind: type, shape: str, content: str) -> None:
    clip, method = CLIPS[shape], kind()
    if method.needs_frames and clip.frames == 1:
        pytest.skip("this method has no rule for pictures")
    x, attention = CONTENT[content](len(clip.frame)), attention_of(clip)
    least = least_budget(method, clip)
    for budget in {*range(least, len(x), 6), least + 1, len(x) - 2, len(x) - 1} - {least - 1, len(x)}:
        chosen = method.choose_clip(x, clip, budget, attention)
        assert len(set(chosen.keep.tolist())) == len(chosen.keep) == budget
        again = method.choose_clip(x.clone(), clip, budget, attention)
        assert torch.equal(again.keep, chosen.keep)
        if chosen.states is not None:
            assert chosen.states.shape == (budget, x.shape[1]) and bool(chosen.states.isfinite().all())
            assert torch.equal(again.states, chosen.states)


@pytest.mark.parametrize("kind", MERGING, ids=lambda kind: kind.name)
def test_a_merged_token_is_a_mean_of_tokens(kind: type) -> None:
    """A convex combination never leaves the range of what it is made of, channel by channel."""
    for noise in (0.1, 0.3):
        x, clip = still_clip(8, 12, noise)
        method = kind() if kind is HoliTom else kind(segments=1)
        chosen = method.choose_clip(x, clip, len(x) // 2, attention_of(clip))
        assert not torch.equal(chosen.states, x[chosen.keep]), "nothing was merged"
        slack = 1e-5
        assert bool((chosen.states <= x.amax(0) + slack).all() and (chosen.states >= x.amin(0) - slack).all())


@pytest.mark.parametrize("kind", MERGING, ids=lambda kind: kind.name)
def test_merging_equal_tokens_changes_nothing(kind: type) -> None:
    picture = rows(12)
    x, clip = picture.repeat(8, 1), Clip.of_grid(8, 12)
    method = kind(segments=1) if kind is not HoliTom else kind()
    chosen = method.choose_clip(x, clip, 48, attention_of(clip))
    span = torch.linalg.lstsq(picture.T, chosen.states.T).solution  # [12, 48] of what places each is made
    torch.testing.assert_close(span.sum(0), torch.ones(48), rtol=0, atol=1e-4)
    assert bool((span > -1e-4).all())


def test_evs_keeps_the_first_frame_and_what_a_cut_brings() -> None:
    x, clip = still_clip(8, 12)
    x[clip.frame >= 5] += rows(12, seed=9).repeat(3, 1)
    kept = EVS().choose_clip(x, clip, 24, None).keep
    assert torch.bincount(clip.frame[kept], minlength=8).tolist() == [12, 0, 0, 0, 0, 12, 0, 0]


@pytest.mark.parametrize("kind", [EVS, DyCoke])
def test_length_of_tokens_does_not_matter(kind: type) -> None:
    clip, x = Clip.of_grid(6, 10), rows(60)
    longer = x * (1 + torch.rand(60, 1, generator=torch.Generator().manual_seed(1)))
    kept = [sorted(kind().choose_clip(states, clip, 40, None).keep.tolist()) for states in (x, longer)]
    assert kept[0] == kept[1]


@pytest.mark.parametrize("kind", [EVS, DyCoke])
def test_too_small_a_budget_is_refused_by_name(kind: type) -> None:
    clip = Clip.of_grid(6, 10)
    least = least_budget(kind(), clip)
    assert len(kind().choose_clip(rows(60), clip, least, None).keep) == least
    with pytest.raises(vtprune.MethodError, match=rf"(?s){kind.name}.*{least} .*ratio of {least / 60:.3f}.*'vcast'"):
        kind().check(clip.sizes, least - 1)


def test_places_that_the_frame_before_lacks_count_as_new() -> None:
    x = torch.ones(len(UNEQUAL.frame), 24) + 0.01 * rows(len(UNEQUAL.frame))
    kept = EVS().choose_clip(x, UNEQUAL, 12 + 11, None).keep
    assert torch.bincount(UNEQUAL.frame[kept], minlength=6).tolist() == [12, 0, 0, 0, 11, 0]


def test_dycoke_thins_three_of_four_frames() -> None:
    clip, x = Clip.of_grid(10, 10), rows(100)
    kept = DyCoke().choose_clip(x, clip, 30 + 21, None).keep
    assert torch.bincount(clip.frame[kept], minlength=10).tolist() == [10, 3, 3, 3, 10, 3, 3, 3, 10, 3]


def test_vcast_rewards_a_turn_in_motion() -> None:
    directions = torch.linalg.qr(rows(24)).Q[:3]
    path = torch.stack([directions[0] + 0.05 * t * directions[1] for t in range(5)])
    turned = path[-1] + torch.stack([0.05 * t * directions[2] for t in range(1, 5)])
    x, clip = torch.cat([path, turned]).repeat_interleave(10, 0) + 1e-4 * rows(90), Clip.of_grid(9, 10)
    kept = VCast().choose_clip(x, clip, 30, None).keep
    counts = torch.bincount(clip.frame[kept], minlength=9)
    assert int(counts[1:-1].argmax()) == 3 and sum(counts) == 30 and int(counts.min()) >= 1


def test_curvature_of_short_and_still_clips() -> None:
    unit = torch.nn.functional.normalize(rows(4), dim=-1)
    assert curvature(unit[:1]).tolist() == [1] and curvature(unit[:2]).tolist() == [1, 1]
    assert curvature(unit[:1].expand(4, -1)).tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("name", ["evs", "vcast", "vidcom2", "dycoke", "fastvid", "holitom", "flashvid"])
def test_rounding_does_not_rank_copies_of_a_frame(name: str) -> None:
    """Tokens of a repeated frame are equal but for rounding, which differs between a clip in a batch and alone."""
    clip, frame, attention = Clip.of_grid(6, 12), rows(12), torch.rand(12, generator=torch.Generator().manual_seed(1))
    kept = []
    for seed in range(4):
        noise = 2e-7 * torch.randn(72, frame.shape[1], generator=torch.Generator().manual_seed(seed))
        x, received = frame.repeat(6, 1) * (1 + noise), attention.repeat(6) * (1 + noise[:, 0])
        kept.append(vtprune.methods.resolve(name).choose_clip(x, clip, 35, received).keep.sort().values.tolist())
    assert all(one == kept[0] for one in kept)


def test_rounding_is_no_motion_to_vcast() -> None:
    """Copies of a frame whose features differ by rounding get the budgets of equal frames."""
    clip, frame = Clip.of_grid(4, 6), rows(6)
    for seed in range(5):
        noise = 2e-7 * torch.randn(24, frame.shape[1], generator=torch.Generator().manual_seed(seed))
        kept = VCast().choose_clip(frame.repeat(4, 1) * (1 + noise), clip, 10, None).keep
        assert torch.bincount(clip.frame[kept]).tolist() == [3, 3, 2, 2]


def test_curvature_of_slow_motion_is_precise() -> None:
    start, way = torch.randn(2, 1, 40, 64, generator=torch.Generator().manual_seed(1))
    bend = 3e-4 * torch.randn(12, 1, 64, generator=torch.Generator().manual_seed(2))
    x = start + 3e-3 * torch.arange(12.0)[:, None, None] * way + bend
    steps = torch.nn.functional.normalize(x.double().mean(1), dim=1).diff(dim=0)
    expected = 1 - torch.cosine_similarity(steps[1:], steps[:-1])
    found = curvature(unit_means(x.flatten(0, 1), Clip.of_grid(12, 40)))[1:-1]
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)


def test_vidcom2_follows_a_permutation_of_frames() -> None:
    clip, x = Clip.of_grid(6, 10), rows(60)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    kept = VidCom2().choose_clip(x, clip, 20, None).keep
    moved = VidCom2().choose_clip(x.view(6, 10, -1)[order].flatten(0, 1), clip, 20, None).keep
    back = order[moved // 10] * 10 + moved % 10
    assert sorted(back.tolist()) == kept.tolist()


def test_segments_end_at_a_cut() -> None:
    similarity = torch.tensor([0.99, 0.99, 0.2, 0.99, 0.95])
    assert cut_segments(similarity, 1, 0.9) == [3, 3]
    assert cut_segments(similarity, 3, 0.9) == [3, 2, 1]
    assert cut_segments(similarity, 99, 0.9) == [1] * 6
    assert cut_segments(torch.full((3,), 0.5), 2, 0.1) == [1, 3]  # ties: the earlier
    assert cut_segments(torch.empty(0), 8, 0.9) == [1]


def test_holitom_averages_what_stands_still() -> None:
    x, clip = still_clip(6, 10)
    parts = split(next_similarity(x, clip), clip, 0.8)
    assert parts.windows == [(0, 5)] and parts.saved == 50
    chosen = HoliTom().choose_clip(x, clip, 10, attention_of(clip))
    assert sorted(chosen.keep.tolist()) == list(range(10))
    torch.testing.assert_close(chosen.states[chosen.keep.argsort()], x.view(6, 10, -1).mean(0))


def test_holitom_has_no_window_longer_than_given() -> None:
    x, clip = still_clip(7, 10)
    parts = split(next_similarity(x, clip), clip, 0.8, longest=3)
    assert parts.windows == [(0, 2), (3, 5), (6, 6)] and parts.saved == 40


def test_holitom_saves_no_more_than_asked() -> None:
    x, clip = still_clip(6, 10)
    chosen = HoliTom().choose_clip(x, clip, 50, attention_of(clip))
    assert len(set(chosen.keep.tolist())) == 50


def test_fastvid_spends_the_whole_budget() -> None:
    for budget in range(1, 100):
        counts = plan([12, 12, 8, 1, 12, 12, 12, 12, 19], [4, 1, 4], budget, 0.4, 2)
        assert sum(counts.salient) + sum(counts.centers) == budget
    even = plan([50] * 8, [8], 80, 0.4, 4)
    assert even.centers == [0, 0, 0, 16, 0, 0, 0, 16] and even.salient == [6] * 8


def test_a_tree_is_divided_by_all_its_members() -> None:
    """A chain of equal frames is as long as one of them."""
    picture, clip = rows(5), Clip.of_grid(8, 5)
    links = torch.cat([torch.full((5,), -1), torch.arange(35)])
    torch.testing.assert_close(tree_means(picture.repeat(8, 1), links, clip)[:5], picture)
    x, weights = rows(40), torch.arange(8.0)
    torch.testing.assert_close(tree_means(x, links, clip)[:5], x.view(8, 5, -1).mean(0))
    assert weights.numel() == clip.frames


def test_flashvid_trees_end_in_the_first_frame_of_a_segment() -> None:
    x, clip = still_clip(8, 12)
    method = FlashVID(segments=2, selected=0.0)
    chosen = method.choose_clip(x, clip, 12, attention_of(clip))
    means = clip.frame_means(x)
    segments = cut_segments(torch.cosine_similarity(means[1:], means[:-1]), 2, 0.9)
    assert torch.bincount(clip.frame[chosen.keep], minlength=8).nonzero()[:, 0].tolist() == [0, segments[0]]


def test_of_equal_tokens_the_first_stay() -> None:
    """Frames and tokens that are equal: rounding, which differs from row to row, decides nothing."""
    for seed in range(40):
        draw = torch.Generator().manual_seed(seed)
        frames, places, width = 9, 23, 33
        kinds = torch.randint(0, 4, (places,), generator=draw)
        x, clip = rows(4, width, seed)[kinds].repeat(frames, 1), Clip.of_grid(frames, places)
        first = list(range(5 * places))  # nothing changes: every token of the later frames ties
        assert EVS().choose_clip(x, clip, len(first), None).keep.tolist() == first
        kept = DyCoke().choose_clip(x, clip, 3 * places + 20, None).keep
        assert kept.tolist() == [
            t * places + p for t in range(9) for p in range(places if t % 4 == 0 else 4 if t < 3 else 3)
        ]
        one = rows(1, width, seed).expand(frames * places, width)
        kept = VCast().choose_clip(one, clip, frames + 4, None).keep
        assert kept.tolist() == [t * places + p for t in range(frames) for p in range(2 if t < 4 else 1)]
        kept = VidCom2().choose_clip(one, clip, frames * 20, None).keep
        assert kept.tolist() == [t * places + p for t in range(frames) for p in range(20)]


def test_of_equal_frames_the_first_ends_a_segment() -> None:
    similarity = 1 - 1e-7 * torch.rand(11, generator=torch.Generator().manual_seed(0))
    assert cut_segments(similarity, 4, 0.9) == [1, 1, 1, 9]


def test_flashvid_takes_the_first_of_equal_tokens() -> None:
    for seed in range(40):
        kinds = torch.randint(0, 6, (40,), generator=torch.Generator().manual_seed(seed))
        x = rows(6, 33, seed)[kinds]
        picks = diverse(x, torch.ones(40), 20).tolist()
        firsts = [kinds.tolist().index(k) for k in set(kinds.tolist())]
        assert picks == sorted([*firsts, *[i for i in range(40) if i not in firsts][: 20 - len(firsts)]])

        frames = list(torch.arange(40).split(20))
        links = tree_links(x, frames, 0.5, 40)
        for token in range(20, 40):
            equal = [i for i in range(20) if kinds[i] == kinds[token]]
            assert not equal or links[token] == equal[0]
        # Where the threshold rises to a similarity that several tokens have, none of them is merged.
        still = rows(20, 33, seed).repeat(2, 1)
        assert bool((tree_links(still, frames, 0.5, 10) == -1).all())


def test_the_mean_of_a_tree_of_equal_tokens_is_the_token() -> None:
    x = rows(5, 33).repeat(3, 1)
    links = torch.cat([torch.full((5,), -1), torch.arange(10)])
    assert torch.equal(tree_means(x, links, Clip.of_grid(3, 5)), x)


def test_a_token_joins_the_first_of_equal_centers_and_a_center_itself() -> None:
    for seed in range(40):
        kinds = torch.randint(0, 3, (30,), generator=torch.Generator().manual_seed(seed))
        x, count = rows(3, 33, seed)[kinds], 12
        first = [kinds[:count].tolist().index(k) if k in kinds[:count] else None for k in kinds.tolist()]
        x[count:] += 0.01 * rows(30 - count, 33, 1000 + seed)
        merged, folded = x[:count].clone(), x[:count].clone()
        for center in range(count):
            members = [center, *[i for i in range(count, 30) if first[i] == center]]
            weight = max(0.6, 1 / (len(members) + 1))
            merged[center] = weight * x[center] + (1 - weight) * x[members].mean(0)
            for member in members[1:]:
                folded[center] = (folded[center] + x[member]) / 2
        known = torch.tensor([i for i in range(30) if first[i] is not None])
        torch.testing.assert_close(summarize(x, torch.arange(count), known, 0.6), merged)
        torch.testing.assert_close(fold(x[known], torch.arange(count)), folded)


def test_density_peaks_by_hand() -> None:
    """Two heaps of points: the center of each is the point with the nearest neighbors."""
    x = torch.tensor([[0.0], [0.1], [0.25], [1.0], [1.1], [1.2]])
    assert density_peaks(pairwise_distances(x), 2, 3).tolist() == [1, 4]
    scores = log_peak_scores(pairwise_distances(x), 3).exp()
    density = {1: (0.1**2 + 0.15**2) / 3, 4: 2 * 0.1**2 / 3, 3: (0.1**2 + 0.2**2) / 3}
    for row, away in ((1, 1.0), (4, 1.2), (3, 0.1)):
        torch.testing.assert_close(scores[row], torch.exp(torch.tensor(-density[row])) * away, rtol=1e-4, atol=0)
    assert density_peaks(pairwise_distances(1e6 * x), 2, 3).tolist() == [1, 4]  # all densities are 0 in float32


def test_options_are_checked() -> None:
    bad = [(VCast, "temperature", 0), (FastVID, "context_share", 1.5), (FastVID, "segments", 0), (HoliTom, "beta", -1)]
    bad += [(FlashVID, "selected", 2), (FlashVID, "segments", 0), (HoliTom, "neighbors", 0), (FastVID, "beta", 2)]
    for kind, name, value in bad:
        assert name in {f.name for f in dataclasses.fields(kind)}
        with pytest.raises(vtprune.MethodError, match=f"{name}(=| (is )?){value}"):
            kind(**{name: value})
