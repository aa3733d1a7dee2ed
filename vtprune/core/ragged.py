# SPDX-License-Identifier: Apache-2.0
"""Keep masks from scores under an exact budget per group: pure tensor functions over the ragged batch."""

from __future__ import annotations

import itertools
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

# Relative difference up to which two neighboring scores tie. Equal tokens (two copies of an image, flat background)
# have equal scores, but float32 sums over prompts of different lengths round differently, by about 1e-7.
TIE = 4e-7


def group_ids(offsets: Tensor, total: int | None = None) -> Tensor:
    """Group number of every row, `[M]` int64.

    Args:
        offsets: `[S + 1]` offsets.
        total: `M`, if known; without it, the call synchronizes with the device of `offsets`.
    """
    if total is not None and len(offsets) == 2:  # the most frequent case: one sample
        return torch.zeros(total, dtype=torch.int64, device=offsets.device)
    lengths = offsets.diff()
    return torch.repeat_interleave(torch.arange(len(lengths), device=offsets.device), lengths, output_size=total)


def group_extreme(values: Tensor, offsets: Tensor, which: Literal["amax", "amin"]) -> Tensor:
    """Largest or smallest value of every row's group: `[M]`, or a single number if there is one group."""
    if len(offsets) == 2 and len(values):
        return values.amax() if which == "amax" else values.amin()
    groups = group_ids(offsets, len(values))
    return values.new_zeros(len(offsets) - 1).scatter_reduce(0, groups, values, which, include_self=False)[groups]


def rank_in_group(scores: Tensor, offsets: Tensor, tolerance: float = TIE) -> Tensor:
    """Rank of every row inside its group: 0 for the largest score, ties (see `TIE`) in order of the row number.

    Args:
        scores: `[M]`, any float dtype.
        offsets: `[S + 1]` offsets.
        tolerance: Relative difference up to which neighboring scores tie.

    Returns:
        Tensor: `[M]` int64.
    """
    groups = _groups_if_several(offsets, len(scores))
    order, tie = _ties(scores, groups, tolerance)
    order = order[torch.sort(tie * len(scores) + order).indices]  # rows of a tie in order of their numbers
    place = torch.arange(len(order), device=order.device)
    if groups is not None:
        place -= offsets[:-1][groups]
    return torch.empty_like(order).scatter_(0, order, place)


def settle_ties(scores: Tensor, offsets: Tensor | None = None, tolerance: float = TIE) -> Tensor:
    """Scores `[M]` in which rows of a group that tie (see `TIE`) all have the largest of their values.

    Greedy methods apply it before their first pick, so that rounding does not decide between equal tokens and a sample
    keeps the same tokens in a batch as alone.
    """
    groups = _groups_if_several(offsets, len(scores))
    if groups is None and scores.device.type == "cpu":
        falling = sorted(scores.tolist(), reverse=True)
        if all(a - b > 2 * tolerance * abs(a) for a, b in itertools.pairwise(falling)):
            return scores
    order, tie = _ties(scores, groups, tolerance)
    values = scores[order]
    first = torch.searchsorted(tie, tie)  # the first row of each tie holds the largest score
    return torch.empty_like(scores).index_copy_(0, order, values[first])


def _groups_if_several(offsets: Tensor | None, total: int) -> Tensor | None:
    """Group number `[M]` of every row; None where there is one group, the most frequent case."""
    return None if offsets is None or len(offsets) == 2 else group_ids(offsets, total)


def _ties(scores: Tensor, groups: Tensor | None, tolerance: float = TIE) -> tuple[Tensor, Tensor]:
    """Rows `[M]` sorted by group and falling score, and the ascending number `[M]` of the tie that each belongs to."""
    values, order = torch.sort(scores, descending=True, stable=True)
    if groups is not None:
        order = order[torch.sort(groups[order], stable=True).indices]
        values = scores[order]
    before, after = values[:-1], values[1:]
    if values.is_floating_point():  # an infinite score ties with its like only
        differ = before - after > tolerance * before.abs().clamp_max(torch.finfo(values.dtype).max)
    else:
        differ = before > after
    if groups is not None:
        group = groups[order]
        differ |= group[:-1] != group[1:]
    tie = torch.zeros_like(order)
    torch.cumsum(differ, 0, out=tie[1:])
    if values.is_floating_point() and tolerance:
        # Many scores close together must not all tie with one another: a tie is no wider than the tolerance.
        first = values[torch.searchsorted(tie, tie)]
        width = tolerance * first.abs().clamp(torch.finfo(values.dtype).tiny, torch.finfo(values.dtype).max)
        part = ((first - values) / width).nan_to_num(0.0).floor()
        torch.cumsum(differ | (part[1:] != part[:-1]), 0, out=tie[1:])
    return order, tie


def first_equal(x: Tensor) -> Tensor:
    """Number `[n]` of the first row that equals each row of `x` `[n, D]`.

    Products of equal rows differ by rounding; with it, rounding does not decide which of them is the nearest.
    """
    x, numbers = x.detach(), torch.arange(len(x), device=x.device)
    if len(torch.unique(x[:, :: x.shape[1] // 8 + 1], dim=0)) == len(x):  # few features tell most rows apart
        return numbers
    kinds = torch.unique(x, dim=0, return_inverse=True)[1]
    return torch.full_like(numbers, len(x)).scatter_reduce(0, kinds, numbers, "amin")[kinds]


def pairwise_cosines(x: Tensor) -> Tensor:
    """Cosines `[n, n]` of the rows of `x` `[n, D]`, the same for equal rows and 1 exactly between them.

    A row of zeros has cosine 0 to every row.
    """
    unit = normalize(x, dim=-1)
    cosines, first = unit @ unit.T, first_equal(unit)
    if bool((first == torch.arange(len(x), device=x.device)).all()):
        return cosines
    equal = (first[:, None] == first) & (unit != 0).any(1)
    return cosines[first][:, first].masked_fill(equal, 1.0)


def top_k(scores: Tensor, offsets: Tensor, budgets: Tensor) -> Tensor:
    """Keeps the `budgets[s]` largest scores of each group; ties go to the smaller row.

    Args:
        scores: `[M]`.
        offsets: `[S + 1]` offsets.
        budgets: `[S]` counts.

    Returns:
        Tensor: `[M]` bool.
    """
    if len(offsets) == 2 and scores.device.type == "cpu":
        keep = _top_of_one(scores, int(budgets))
        if keep is not None:
            return keep
    groups, budgets = _groups_if_several(offsets, len(scores)), budgets.to(scores.device)
    return rank_in_group(scores, offsets) < (budgets if groups is None else budgets[groups])


def _top_of_one(scores: Tensor, count: int) -> Tensor | None:
    """`top_k` of one group, with few operations; None if ties may decide which row is the last."""
    values, order = torch.sort(scores, descending=True, stable=True)
    if 0 < count < len(scores):
        last, following = values[count - 1 : count + 1].tolist()
        if not last - following > 2 * TIE * abs(last):
            return None
    return torch.zeros(len(scores), dtype=torch.bool).index_fill_(0, order[:count], True)


def from_order(order: Tensor, total: int) -> Tensor:
    """Keep mask `[total]` from chosen row numbers in any order; entries of -1 are padding."""
    # Padding sets one extra row, the last, which is cut off: selecting the other entries would synchronize.
    keep = torch.zeros(total + 1, dtype=torch.bool, device=order.device)
    return keep.index_fill_(0, order.flatten(), True)[:total]


def seeded_scores(offsets: Tensor, seed: int) -> Tensor:
    """Uniform scores `[M]` in [0, 1), drawn for every group from a new generator with the given seed.

    They are drawn on the CPU, so that they are the same on every device; the global generator is not used.
    """
    draws, ends = [], offsets.tolist()
    for start, end in zip(ends, ends[1:], strict=False):
        generator = torch.Generator().manual_seed(int(seed))
        draws.append(torch.rand(end - start, generator=generator, dtype=torch.float32))
    scores = draws[0] if len(draws) == 1 else torch.cat([torch.zeros(0, dtype=torch.float32), *draws])
    return scores.to(offsets.device)


def scatter(x: Tensor, index: Tensor, valid: Tensor | None, length: int) -> Tensor:
    """Scatters the packed layout back to `length` positions; the others are zero.

    Args:
        x: `[B, K, ...]`.
        index, valid: The packed layout, `[B, K]`, on the device of `x`; `valid` is None if all slots are.
        length: Number of positions `T`.

    Returns:
        Tensor: `[B, T, ...]`, differentiable in `x`.
    """
    if len(index) == 1 and valid is None:
        return x.new_zeros(x.shape[0], length, *x.shape[2:]).index_copy_(1, index[0], x)
    full = x.new_zeros(x.shape[0], length + 1, *x.shape[2:])
    # Invalid slots go to an extra position that is cut off.
    target = index if valid is None else torch.where(valid, index, length)
    batch = torch.arange(x.shape[0], device=x.device)[:, None].expand_as(target)
    return full.index_put_((batch, target), x)[:, :length]
