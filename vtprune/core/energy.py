# SPDX-License-Identifier: Apache-2.0
"""How many tokens a picture needs: as many as explain a given share of the energy of all of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vtprune_kernels import residual_pivots
from vtprune_kernels.residual_pivots import residual_energy


def bounds(total: int, least: float, most: float) -> tuple[int, int]:
    """Smallest and largest count of `total` tokens between two shares, 1 at least; the largest wins a conflict."""
    largest = max(1, math.floor(most * total + 1e-9))
    return min(max(1, math.ceil(least * total - 1e-9)), largest), largest


def energy_left(features: Tensor, offsets: Tensor, most: float = 1.0) -> list[Tensor]:
    """For each group, the share of its energy that the first 1, 2, ... picks of residual selection leave.

    Args:
        features: `[M, D]`; rows of zeros (tokens without a place) are never needed.
        offsets: `[S + 1]` int64 offsets of the groups.
        most: Share of each group that is picked at most.

    Returns:
        list[Tensor]: `[k]` float32 on the CPU, k the largest count that `most` allows.
    """
    offsets = offsets.cpu()
    largest = torch.tensor([bounds(size, 0.0, most)[1] if size else 0 for size in offsets.diff().tolist()])
    order = residual_pivots(
        features, None, offsets, largest, int(largest.max()) if len(largest) else 0, int(offsets.diff().max())
    )
    left = residual_energy(features, order, offsets).cpu()
    return [row[:count] for row, count in zip(left, largest.tolist(), strict=True)]


def count_for_energy(features: Tensor, offsets: Tensor, energy: float, least: float = 0.0, most: float = 1.0) -> Tensor:
    """The smallest count whose picks leave at most `1 - energy` of each group's energy.

    Args:
        features: `[M, D]`.
        offsets: `[S + 1]` int64 offsets of the groups.
        energy: Share to be explained, above 0 and below 1.
        least, most: Shares of each group that bound the count.

    Returns:
        Tensor: `[S]` int64 on the CPU.
    """
    out = []
    for left, size in zip(energy_left(features, offsets, most), offsets.diff().tolist(), strict=True):
        smallest, largest = bounds(size, least, most)
        needed = int((left > 1 - energy).sum()) + 1  # falling: the first that is low enough
        out.append(min(max(needed, smallest), largest) if size else 0)
    return torch.tensor(out)
