# SPDX-License-Identifier: Apache-2.0
"""Pivots, and the tokens that resemble them least: the choice of DART (arXiv 2502.11494)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..selection import segment_ids, top_k


def take_least_similar(hidden: Tensor, start: Tensor, pivots: list[Tensor], segments: Tensor, quota: Tensor) -> Tensor:
    """Takes, pivot by pivot, the tokens that resemble the pivot least among those not taken yet.

    Args:
        hidden: `[M, D]` states of the candidates.
        start: `[M]` bool, what is taken from the start.
        pivots: For each pool `[P, D]` states of its pivots, in the order in which they take.
        segments: `[S + 1]` offsets of the pools.
        quota: `[S]` how many tokens the pivots of a pool take together: each the same number, and one more for as many
            of the first ones as the division leaves over. No more than there are.

    Returns:
        Tensor: `[M]` bool, `start` and what the pivots took. Equal similarities go to the smaller row.
    """
    lengths = segments.diff().tolist()
    unit = nn.functional.normalize(torch.nan_to_num(hidden.float()), dim=-1)
    dense = pad_sequence(list(unit.split(lengths)), batch_first=True)  # [S, N, D]
    taken = pad_sequence(list(start.split(lengths)), batch_first=True, padding_value=1).bool()  # [S, N]
    number = torch.tensor([len(p) for p in pivots], device=hidden.device).clamp_min(1)
    axes = nn.functional.normalize(torch.nan_to_num(pad_sequence(pivots, batch_first=True).float()), dim=-1)
    similarity = axes @ dense.mT  # [S, P, N]
    for p in range(axes.shape[1]):
        share = torch.where(p < number, quota // number + (p < quota % number), 0)
        order = similarity[:, p].masked_fill(taken, torch.inf).sort(dim=1, stable=True).indices
        taken |= order.argsort(dim=1) < share[:, None]
    return torch.cat([row[:n] for row, n in zip(taken, lengths, strict=True)])


def duplication_aware(
    hidden: Tensor,
    size: Tensor,
    segments: Tensor,
    budgets: Tensor,
    text: Tensor,
    text_size: Tensor,
    text_segments: Tensor,
    pivots: int = 4,
    exact: bool = True,
) -> Tensor:
    """The choice of DART.

    Args:
        hidden: `[M, D]` normed states of the visual tokens.
        size: `[M]` L1 norms of their keys.
        segments: `[S + 1]` offsets of the pools.
        budgets: `[S]` counts.
        text: `[R, D]` normed states of the text after the image.
        text_size: `[R]` L1 norms of its keys.
        text_segments: `[S + 1]` offsets of each pool's text.
        pivots: Pivots of each kind.
        exact: False takes `floor(budget / (2 pivots))` tokens per pivot, as released.

    Returns:
        Tensor: `[M]` bool.
    """
    budgets = budgets.to(hidden.device)
    image = top_k(size, segments, budgets.clamp_max(pivots))
    chosen = top_k(text_size, text_segments, text_segments.diff().clamp_max(pivots))
    pools = segment_ids(segments, len(size))[image], segment_ids(text_segments, len(text_size))[chosen]
    ours, theirs = (pool.bincount(minlength=len(budgets)).tolist() for pool in pools)
    # Visual pivots lie before those of the text: together they ascend.
    groups = [torch.cat(pair) for pair in zip(hidden[image].split(ours), text[chosen].split(theirs), strict=True)]
    room = segments.diff().to(hidden.device) - budgets.clamp_max(pivots)
    quota = budgets - budgets.clamp_max(pivots)
    if not exact:
        quota = budgets // (2 * pivots) * torch.tensor([len(g) for g in groups], device=hidden.device)
    return take_least_similar(hidden, image, groups, segments, torch.minimum(quota, room))
