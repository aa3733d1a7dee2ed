# SPDX-License-Identifier: Apache-2.0
"""Similarities of rank-one updates, as matrix products."""

from __future__ import annotations

import torch
from torch import Tensor

from .._ragged import on_host, unit_rows

# Half a scaled squared length of keys up to which the distance of two keys, a difference of such lengths, is precise to
# about 4e-6 in float32.
_LARGE = 32.0


class Duplication:
    """Similarities between rows of one group, as matrix products over blocks of rows.

    Args:
        keys: `[n, G, dk]`, any float dtype; distances of long ones are computed in float64 on the host.
        values: `[n, G, dv]`.
        scaling: Factor of the attention's dot product, `dk ** -0.5` by default.
    """

    def __init__(self, keys: Tensor, values: Tensor, scaling: float | None = None) -> None:
        keys = keys.float()
        self.scale = keys.shape[-1] ** -0.5 if scaling is None else scaling
        # Distances are invariant under a shift; without the mean of the keys (their bias), less precision is lost.
        self.keys = keys - keys.mean(0)
        self.half = self._half()
        if on_host(keys) and len(keys) and float(self.half.amax()) > _LARGE:
            self.keys = self.keys.double()
            self.half = self._half()
        self.values = unit_rows(values)

    def _half(self) -> Tensor:
        """`[n, G]` half the squared length of each key, scaled."""
        return self.keys.square().sum(-1) * (self.scale / 2)

    def __call__(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Similarity `[R, C]` of `rows` `[R]` and `columns` `[C]`, averaged over the KV heads."""
        key_rows, key_columns = self.keys[rows].transpose(0, 1), self.keys[columns].permute(1, 2, 0)  # [G, dk, C]
        exponent = torch.baddbmm(self.half[columns].T[:, None], key_rows, key_columns, beta=-1, alpha=self.scale)
        exponent = (exponent - self.half[rows].T[..., None]).clamp_max_(0).float()  # [G, R, C]
        cosine = self.values[rows].transpose(0, 1) @ self.values[columns].permute(1, 2, 0)  # [G, R, C]
        return exponent.exp_().mul_(cosine).mean(0)

    def all_pairs(self) -> Tensor:
        """Similarity `[n, n]` of all rows; distances of equal keys are exactly 0."""
        keys, values = self.keys.transpose(0, 1), self.values.transpose(0, 1)
        exponent = torch.bmm(keys, keys.mT).mul_(self.scale)  # [G, n, n]
        half = exponent.diagonal(dim1=1, dim2=2) / 2
        exponent = exponent.sub_(half[:, None]).sub_(half[..., None]).clamp_max_(0).float()
        return exponent.exp_().mul_(torch.bmm(values, values.mT)).mean(0)
