# SPDX-License-Identifier: Apache-2.0
"""Cosine similarities of rows, computed in blocks without a normalized copy of the rows."""

from __future__ import annotations

import functools
import math
from copy import copy

import torch
from torch import Tensor

from ._ragged import self_cosine, unit_rows


class Cosine:
    """Cosine similarities of the rows of a matrix; rows that are zero or not finite count as zero.

    Args:
        features: `[n, D]`, any float dtype.
        weights: `[n]` factors on the rows, or None; those that are not finite count as zero.
    """

    def __init__(self, features: Tensor, weights: Tensor | None = None, eps: float = 1e-6) -> None:
        self.rows, self.given = features.float(), features
        self.length = torch.linalg.vector_norm(self.rows, dim=1)
        if math.isfinite(self.length.sum()):
            self.factor = self.length.clamp_min(eps).reciprocal_()
        else:
            self.rows = self.given = unit_rows(features)
            self.factor = torch.ones_like(self.length)
        self.weights = weights
        if weights is not None:
            self.weights = torch.nan_to_num(weights, nan=0.0, posinf=0.0, neginf=0.0)
            self.factor = self.factor * self.weights

    @functools.cached_property
    def squares(self) -> Tensor:
        """`[n]` similarity of each row to itself; exact unless a row is zero or tiny."""
        squares = self_cosine(self.length)
        return squares if self.weights is None else squares * self.weights.square()

    def __len__(self) -> int:
        return len(self.rows)

    def __call__(self, rows: Tensor | slice, columns: Tensor | None = None) -> Tensor:
        """Similarities `[R, C]` of `rows` and `columns`, by default all rows."""
        return self.between(rows, self if columns is None else self.subset(columns))

    def between(self, rows: Tensor | slice, others: Cosine) -> Tensor:
        """Similarities `[R, m]` of `rows` and all rows of `others`."""
        return (self.rows[rows] @ others.rows.T).float().mul_(self.factor[rows, None]).mul_(others.factor)

    def pairs(self, others: Tensor) -> Tensor:
        """Similarity `[n]` of every row `i` and row `others[i]`."""
        pieces = zip(self.rows.split(64), others.split(64), strict=True)  # few enough to stay in the processor's cache
        products = [self.rows[numbers].mul_(rows).sum(1) for rows, numbers in pieces]
        return torch.cat(products).mul_(self.factor).mul_(self.factor[others])

    def rounded(self, dtype: torch.dtype) -> Cosine:
        """Copy that computes in `dtype`, from rows rounded to it; rows given in `dtype` are not copied."""
        part = copy(self)
        part.rows = part.given = self.given.to(dtype)
        return part

    def subset(self, rows: Tensor | slice) -> Cosine:
        """Copy with the given rows only; a view for a slice."""
        part = copy(self)
        part.rows, part.factor = self.rows[rows], self.factor[rows]
        part.given = part.rows
        return part

    def nearby(self, width: int) -> Tensor:
        """Similarities `[n // width, width, width]` within consecutive blocks of `width` rows; the rest is left out."""
        whole = len(self) - len(self) % width
        blocks, factor = self.rows[:whole].unflatten(0, (-1, width)), self.factor[:whole].unflatten(0, (-1, width))
        return (blocks @ blocks.mT).float().mul_(factor[:, :, None]).mul_(factor[:, None])
