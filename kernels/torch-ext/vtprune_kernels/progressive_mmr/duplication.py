# SPDX-License-Identifier: Apache-2.0
"""Similarities of rank-one updates, as matrix products."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .._ragged import unit_rows


class Duplication:
    """Similarities between rows of one group, as matrix products over blocks of rows.

    Args:
        keys: `[n, G, dk]`, any float dtype.
        values: `[n, G, dv]`.
        scaling: Factor of the attention's dot product, `dk ** -0.5` by default.
    """

    def __init__(self, keys: Tensor, values: Tensor, scaling: float | None = None) -> None:
        keys = keys.float()
        # Distances are invariant under a shift; without the mean of the keys (their bias), less precision is lost.
        self.keys = keys - keys.mean(0)
        self.scale = keys.shape[-1] ** -0.5 if scaling is None else scaling
        self.values = unit_rows(values)

    @functools.cached_property
    def half(self) -> Tensor:
        """`[n, G]` half the squared length of each key, scaled."""
        return self.keys.square().sum(-1) * (self.scale / 2)

    def __call__(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Similarity `[R, C]` of `rows` `[R]` and `columns` `[C]`, averaged over the KV heads."""
        key_rows, key_columns = self.keys[rows].transpose(0, 1), self.keys[columns].permute(1, 2, 0)  # [G, dk, C]
        exponent = torch.baddbmm(self.half[columns].T[:, None], key_rows, key_columns, beta=-1, alpha=self.scale)
        exponent = (exponent - self.half[rows].T[..., None]).clamp_max_(0)  # [G, R, C]
        cosine = self.values[rows].transpose(0, 1) @ self.values[columns].permute(1, 2, 0)  # [G, R, C]
        return exponent.exp_().mul_(cosine).mean(0)

    def all_pairs(self) -> Tensor:
        """Similarity `[n, n]` of all rows; distances of equal keys are exactly 0."""
        keys, values = self.keys.transpose(0, 1), self.values.transpose(0, 1)
        exponent = torch.bmm(keys, keys.mT).mul_(self.scale)  # [G, n, n]
        half = exponent.diagonal(dim1=1, dim2=2) / 2
        exponent.sub_(half[:, None]).sub_(half[..., None]).clamp_max_(0)
        return exponent.exp_().mul_(torch.bmm(values, values.mT)).mean(0)
