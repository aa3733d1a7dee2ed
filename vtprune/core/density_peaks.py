# SPDX-License-Identifier: Apache-2.0
"""Clustering by density peaks (DPC-kNN): centers are dense tokens far from any denser one."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def pairwise_distances(x: Tensor) -> Tensor:
    """Euclidean distances `[n, n]` between the rows of `x` `[n, D]`, divided by the square root of `D`."""
    # Not by a matrix product, so that equal rows have distance 0.
    return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") / math.sqrt(x.shape[1])


def log_peak_scores(distances: Tensor, neighbors: int) -> Tensor:
    """Logarithm of density times distance to the nearest denser token.

    The density is `exp(-mean of the squared distances to the nearest neighbors)`, the token itself being one of them;
    for the densest token, or several equally dense ones, the distance is the largest of all. Logarithms avoid
    underflow: densities of long feature vectors are zero in float32.

    Args:
        distances: `[n, n]` from `pairwise_distances`.
        neighbors: Number of nearest neighbors in the density, at most `n`.

    Returns:
        Tensor: `[n]`; the largest are the centers.
    """
    nearest = distances.topk(min(neighbors, len(distances)), largest=False).values
    log_density = -nearest.square().mean(1)
    denser = log_density[None, :] > log_density[:, None]
    away = torch.where(denser, distances, torch.inf).amin(1)
    away = torch.where(denser.any(1), away, distances.max())
    return log_density + away.log()


def density_peaks(distances: Tensor, count: int, neighbors: int) -> Tensor:
    """Rows `[count]` of the centers, ascending; ties go to the smaller row."""
    order = log_peak_scores(distances, neighbors).sort(descending=True, stable=True).indices
    return order[:count].sort().values


def group_sums(x: Tensor, group: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Sums `[count, D]` of the rows of `x` `[n, D]` by group, and the number of rows `[count]` in each.

    Rows are added in order, so that the result is deterministic on every device.
    """
    order = group.sort(stable=True).indices
    sizes = torch.bincount(group, minlength=count)
    return torch.segment_reduce(x[order], "sum", lengths=sizes, unsafe=True), sizes


def group_means(x: Tensor, group: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Means `[count, D]` of the rows of `x` `[n, D]` by group, 0 for an empty one, and the number of rows in each."""
    sums, sizes = group_sums(x, group, count)
    return sums / sizes.clamp_min(1)[:, None], sizes
