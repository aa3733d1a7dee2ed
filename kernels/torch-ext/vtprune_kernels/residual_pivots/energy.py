# SPDX-License-Identifier: Apache-2.0
"""Share of a group's energy that the first rows of an order leave unexplained."""

from __future__ import annotations

import torch
from torch import Tensor

from .._ragged import spans
from ..dpp_map.naive import EXHAUSTED


def residual_energy(features: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
    """Share of the energy of each group that is left after each pick, `1 - |P_k X|^2 / |X|^2`.

    `P_k` projects onto the span of the first k picks. Any order is accepted; with that of `residual_pivots` the share
    falls about as fast as possible.

    Args:
        features: `[M, D]` float; rows that are not finite count as zero.
        order: `[S, K]` int64 rows of each group, padded with -1. If it is on a device, the call synchronizes.
        offsets: `[S + 1]` int64 offsets of the groups.

    Returns:
        Tensor: `[S, K]` float32, falling along a row, 0 for groups without energy; padding repeats the last value.
    """
    left = torch.zeros(order.shape, device=features.device, dtype=torch.float32)
    for number, (start, stop) in enumerate(spans(offsets)):
        rows = features[start:stop].float()
        rows = torch.where(torch.isfinite(rows).all(1, keepdim=True), rows, 0)
        total = rows.square().sum()
        picks = order[number]
        chosen = features[picks.clamp_min(0)].float() * (picks >= 0)[:, None]
        chosen = torch.where(torch.isfinite(chosen).all(1, keepdim=True), chosen, 0)
        basis, triangle = torch.linalg.qr(chosen.T)  # [D, min(D, K)]
        # The basis vector of a row that earlier ones explain is arbitrary, and not counted.
        new = triangle.diagonal().square() > EXHAUSTED * chosen[: basis.shape[1]].square().sum(1)
        explained = _prefix_sums((rows @ basis).square().sum(0) * new)
        left[number, : len(explained)] = 1 - explained / total.clamp_min(torch.finfo(torch.float32).tiny)
        left[number, len(explained) :] = left[number, len(explained) - 1 : len(explained)]
        left[number] *= total > 0
    return left.clamp(0, 1)


def _prefix_sums(x: Tensor) -> Tensor:
    """`x.cumsum(0)`; on the host with `torch.use_deterministic_algorithms`, which refuses it on a GPU."""
    return x.cpu().cumsum(0).to(x.device) if torch.are_deterministic_algorithms_enabled() else x.cumsum(0)
