# SPDX-License-Identifier: Apache-2.0
"""Gathering of kept positions into a packed layout, and scattering back. Pure functions on tensors.

A *packed layout* is a pair `index`, `valid`, both `[B, K]`: slot `j` of row `b` holds prompt position `index[b, j]`.
Slots that are not valid pad rows that kept fewer tokens; they repeat some token and are never attended to.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vtprune_kernels import compact

from ..core.ragged import scatter

__all__ = ["column_dim", "gather", "gather_all", "pack", "scatter"]


def all_positions(batch: int, length: int) -> tuple[Tensor, Tensor]:
    """The packed layout of an uncut call."""
    return torch.arange(length).expand(batch, -1), torch.ones(batch, length, dtype=torch.bool)


def pack(keep: Tensor, real: Tensor | None, mixing: bool = False) -> tuple[Tensor, Tensor]:
    """Packs the kept positions of every row to the left, in order.

    Of a row's padding, only as much is kept as the longest row requires, the rightmost first: with right padding
    `generate` reads the last position.

    Args:
        keep: `[B, T]` bool, positions that stay unless they are padding.
        real: `[B, T]` bool, False for padding; None if there is none.
        mixing: Whether layers mix neighboring positions regardless of masks (convolution, linear attention). Then all
            padding after a row's first token stays, as in the unpruned model, and rows are packed to the right, because
            only invalid slots in front of a row do not affect its tokens.

    Returns:
        tuple: `index` int64 and `valid` bool, both `[B, K]`.
    """
    if len(keep) == 1 and real is None:
        columns = keep[0].nonzero().T
        return columns, torch.ones_like(columns, dtype=torch.bool)
    real = torch.ones_like(keep) if real is None else real
    rows = []
    for keep_row, real_row in zip(keep, real, strict=True):
        needed = keep_row & ((real_row.cumsum(0) > 0) if mixing else real_row)
        needed[-1] |= keep_row[-1]
        rows.append((needed, keep_row & ~needed))
    width = max(int(needed.sum()) for needed, _ in rows)
    index = torch.zeros(len(rows), width, dtype=torch.long)
    valid = torch.zeros(len(rows), width, dtype=torch.bool)
    for b, (needed, spare) in enumerate(rows):
        room = width - int(needed.sum())
        if room:
            padding = spare.nonzero()[:, 0]
            needed = needed.clone()
            needed[padding[max(0, len(padding) - room) :]] = True
        columns = needed.nonzero()[:, 0]
        place = slice(width - len(columns), None) if mixing else slice(0, len(columns))
        index[b, place] = columns
        valid[b, place] = True
    return index, valid


def gather(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """Gathers positions along dimension `dim` of `x`, which follows the batch dimension (of size 1 for all rows).

    Args:
        x: `[..., B or 1, T, ...]`, with at most one dimension before the batch.
        index: `[B, K]` on the device of `x`.
        dim: Dimension of `T`; 0 for a tensor without a batch dimension.

    Returns:
        Tensor: `[..., B, K, ...]`, differentiable in `x`; without batch dimension if `x` has none and `index` one row.
    """
    return gather_all([(x, dim)], index)[0]


def gather_all(tensors: Sequence[tuple[Tensor, int]], index: Tensor) -> list[Tensor]:
    """`gather` of several tensors, each with its `dim`, in one kernel launch for all of the same batch size."""
    batch = len(index)
    flat = [_batched(x, dim, batch) for x, dim in tensors]  # [B, T, ...] or [n B, T, ...]
    results: list[Tensor] = [index] * len(flat)
    for rows in sorted({len(x) for x in flat}):
        same_length = [number for number, x in enumerate(flat) if len(x) == rows]
        repeats = rows // max(batch, 1)
        found = compact(
            [flat[number] for number in same_length], index if repeats == 1 else index.repeat(repeats, 1), padded=False
        )
        for number, result in zip(same_length, found, strict=True):
            results[number] = result
    return [_unbatched(result, x, dim, batch) for result, (x, dim) in zip(results, tensors, strict=True)]


def _batched(x: Tensor, dim: int, batch: int) -> Tensor:
    """Reshapes `x` to `[rows, T, ...]`, where `rows` is a multiple of the batch size."""
    if dim == 0:
        return x.expand(batch, *x.shape)
    if dim == 1 and x.shape[0] == batch:
        return x
    shape = (*x.shape[: dim - 1], batch, *x.shape[dim:])
    return x.expand(shape).flatten(0, dim - 1)


def _unbatched(result: Tensor, x: Tensor, dim: int, batch: int) -> Tensor:
    """Reverts the reshaping of `x` by `_batched`."""
    if dim == 0:
        return result[0] if batch == 1 else result
    if dim == 1 and x.shape[0] == batch:
        return result
    return result.unflatten(0, (*x.shape[: dim - 1], batch))


def column_dim(x: Tensor, batch: int, length: int) -> int | None:
    """Dimension of the prompt positions in a tensor that a decoder passes to its layers, or None.

    Known layouts: `[B or 1, T, ...]` (states, rotations, position ids), `[n, B or 1, T, ...]` (three or four position
    axes, stacked states) and `[T]`.
    """
    if x.dim() >= 2 and x.shape[1] == length and x.shape[0] in (1, batch):
        return 1
    if x.dim() >= 3 and x.shape[2] == length and x.shape[1] in (1, batch):
        return 2
    if x.dim() == 1 and x.shape[0] == length:
        return 0
    return None
