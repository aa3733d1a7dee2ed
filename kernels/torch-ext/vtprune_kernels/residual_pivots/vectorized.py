# SPDX-License-Identifier: Apache-2.0
"""Residual selection as greedy MAP of a determinantal point process.

The residual energy of a row is its conditional variance in the kernel of all products, so QR with column pivoting is
pivoted Cholesky of that kernel, and weights scale the rows. The selection is that of `dpp_map`, including lazy
evaluation, with lengths as relevance. In float32 that is as good as the specification while the residual of the best
row is not small; from there on it is continued in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._cosine import Cosine
from .._ragged import segment_maximum, select_by_group
from .._small import is_small_for_residuals
from ..dpp_map import gram
from ..dpp_map import vectorized as lazy
from ..facility_location.naive import usable
from .naive import EXPLAINED, fill

_SURE = 1e-4  # share of a row's energy of which float32 still knows enough digits, after hundreds of picks


def relevance(features: Tensor, length: Tensor, weights: Tensor | None, offsets: Tensor) -> Tensor:
    """Factors `[M]` that turn cosines into products of weighted rows; at most 1 without weights.

    Args:
        features: `[M, D]`.
        length: `[M]` float32 lengths of the rows.
        weights: `[M]` or None.
        offsets: `[S + 1]` offsets; each group is scaled by its longest row, so that squares stay in range.
    """
    length = torch.nan_to_num(length, nan=0.0, posinf=0.0)
    scaled = length / segment_maximum(length, offsets).clamp_min(torch.finfo(torch.float32).tiny)
    return scaled if weights is None else scaled * usable(weights).sqrt()


def sure_of(kernel: Cosine, weights: Tensor | None) -> Tensor:
    """Energy `[n]` that a row of one group must have left for float32 to rank it."""
    return (_SURE * kernel.squares).clamp_min(EXPLAINED if weights is None else EXPLAINED * usable(weights))


def residual_pivots(
    features: Tensor, weights: Tensor | None, offsets: Tensor, budgets: Tensor, max_budget: int | None = None
) -> Tensor:
    """See `vtprune_kernels.residual_pivots`."""
    length, rank = torch.linalg.vector_norm(features.float(), dim=1), features.shape[1]
    factor = relevance(features, length, weights, offsets)

    def of_group(start: int, stop: int, budget: int) -> Tensor:
        kernel = Cosine(features[start:stop], factor[start:stop])
        weight = None if weights is None else weights[start:stop]
        choose = gram.choose if is_small_for_residuals(stop - start, rank, budget) else lazy.choose
        chosen = choose(kernel, budget, rank, sure_of(kernel, weight))
        if len(chosen) == budget:
            return chosen
        return _continued(features[start:stop], weight, chosen, budget)

    return select_by_group(offsets, budgets, features.device, max_budget, of_group)


def _continued(features: Tensor, weights: Tensor | None, chosen: Tensor, budget: int) -> Tensor:
    """Continues the selection `chosen` of rows of one group in float64, up to `budget` rows.

    It runs on the host, since not every device has float64.
    """
    rows, chosen = features.to("cpu", torch.float64), chosen.cpu()
    rows = torch.where(torch.isfinite(rows).all(1, keepdim=True), rows, 0)
    energy, done = rows.square().sum(1), len(chosen)
    weight = torch.ones_like(energy) if weights is None else usable(weights).to(rows)
    factors = rows.new_zeros(budget, len(rows))  # with the selected rows S: X_S X^T = L factors
    picks, order = rows[chosen], rows.new_empty(budget, dtype=torch.int64)
    triangle = torch.linalg.cholesky(picks @ picks.T)
    factors[:done], order[:done] = torch.linalg.solve_triangular(triangle, picks @ rows.T, upper=False), chosen
    left = (energy - factors[:done].square().sum(0)).index_fill(0, chosen, -torch.inf)
    for step in range(done, budget):
        gain, row = (weight * left).masked_fill(left == -torch.inf, -torch.inf).max(0)
        if not float(gain) > 0 or float(left.max()) <= EXPLAINED * float(energy.max()):
            order[step:] = fill(weight * energy, left == -torch.inf, budget - step)
            break
        factor = rows @ rows[row] - factors[:step].T @ factors[:step, row]
        factors[step] = factor / left[row].sqrt()
        left -= factors[step].square()
        left[row], order[step] = -torch.inf, row
    return order.to(features.device)
