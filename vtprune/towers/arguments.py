# SPDX-License-Identifier: Apache-2.0
"""Cuts the arguments of a tower's block, recognized by their shapes, to the rows that are left."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..models.arguments import map_tensors
from ..vision.block_calls import Offsets


@dataclass
class Rows:
    """Rows of a tower's states that run in one call of a block: the same number in each of some entries of the batch.

    Attributes:
        batch, length: Shape `[B, L]` of the full states.
        entries: `[g]` entries of the batch, ascending.
        index: `[g, K]` rows of each, ascending.
        offsets: Recognizes offsets.
        made: Cache of cut arguments by `id` of the uncut one; values hold both.
    """

    batch: int
    length: int
    entries: Tensor
    index: Tensor
    offsets: Offsets
    made: dict[Any, tuple[Any, Any]] = field(default_factory=dict)

    def take(self, x: Tensor, dim: int, of_entries: bool) -> Tensor:
        """Gathers the rows along `dim`; with `of_entries`, dimension 0 is the batch (or 1 for all entries)."""
        if self.batch == 1 or not of_entries:  # without entries, one runs at a time, see `_groups` in `selecting`
            return x.index_select(dim, self.index[0])
        moved = (x.expand(self.batch, *x.shape[1:]) if x.shape[0] == 1 else x).movedim(dim, 1)
        if len(moved) == self.batch:
            return moved[self.entries[:, None], self.index].movedim(1, dim)
        # Of a mask, the entries of this group were selected together with its other dimension.
        index = self.index.reshape(*self.index.shape, *[1] * (moved.dim() - 2)).expand(-1, -1, *moved.shape[2:])
        return moved.gather(1, index).movedim(1, dim)

    def put(self, full: Tensor, rows: Tensor) -> Tensor:
        """Returns states `[B, L, D]` with `rows` `[g, K, D]` written into them."""
        if self.batch == 1:
            return full.index_copy(1, self.index[0], rows)
        return full.index_put((self.entries[:, None], self.index), rows)


def with_states(args: tuple, kwargs: dict[str, Any], states: Tensor) -> tuple[tuple, dict[str, Any]]:
    """The arguments with other hidden states."""
    if args:
        return (states, *args[1:]), kwargs
    name = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
    return args, {**kwargs, name: states}


def cut(args: tuple, kwargs: dict[str, Any], rows: Rows, states: Tensor) -> tuple[tuple, dict[str, Any]]:
    """Cuts a block's arguments to `rows`, and replaces its hidden states by `states`."""
    first = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs), "")
    longest = _longest(args, kwargs, rows)
    rest = tuple(_cut("", value, rows, longest) for value in args[1:])
    named_ones = {
        name: value if not args and name == first else _cut(name, value, rows, longest)
        for name, value in kwargs.items()
    }
    return with_states((*args[:1], *rest), named_ones, states)


def _longest(args: tuple, kwargs: dict[str, Any], rows: Rows) -> tuple[int, int] | None:
    """Length of the longest sequence of a packed one, before and after the cut; None without offsets."""
    found = next((o for v in (*args[1:], *kwargs.values()) if (o := rows.offsets.read(v)) is not None), None)
    return None if found is None else (int(found.diff().max()), int(cut_offsets(found, rows).diff().max()))


def _cut(name: str, value: Any, rows: Rows, longest: tuple[int, int] | None) -> Any:
    if longest is not None and "max" in name:
        if isinstance(value, int) and value == longest[0]:
            return longest[1]
        if isinstance(value, Tensor) and value.numel() == 1 and int(value) == longest[0]:
            return torch.full_like(value, longest[1])
    return map_tensors(value, lambda x: _cut_tensor(name, x, rows))


def _cut_tensor(name: str, x: Tensor, rows: Rows) -> Tensor:
    known = rows.made.get(id(x))
    if known is None:
        known = rows.made[id(x)] = (x, _made(name, x, rows))
    return known[1]


def _made(name: str, x: Tensor, rows: Rows) -> Tensor:
    known = rows.offsets.read(x)
    if known is not None:
        return cut_offsets(known, rows).to(x.device, x.dtype)
    if rows.index.device != x.device:
        rows = Rows(rows.batch, rows.length, rows.entries.to(x.device), rows.index.to(x.device), rows.offsets)
    # An unnamed mask; rotations `[L, D]` are square too where a picture has as many patches as a head has channels.
    square = (x.dim() > 3 or x.dtype == torch.bool) and x.dim() > 1 and x.shape[-1] == x.shape[-2] == rows.length
    if "mask" in name or square:
        dims = [d for d in range(max(0, x.dim() - 2), x.dim()) if x.shape[d] == rows.length]
    else:
        dims = [d for d in range(min(3, x.dim())) if x.shape[d] == rows.length][:1]
        if rows.batch > 1 and dims == [0] and x.dim() > 1 and x.shape[1] == rows.length:
            dims = [1]  # a batch of as many entries as there are rows
    of_entries = x.dim() > 0 and x.shape[0] in (1, rows.batch) and 0 not in dims and x.dim() > 1
    for dim in dims:
        x = rows.take(x, dim, of_entries)
    if not dims and rows.batch > 1 and x.dim() >= 1 and x.shape[0] == rows.batch:
        x = x[rows.entries]
    return x


def cut_offsets(offsets: Tensor, rows: Rows) -> Tensor:
    """Offsets after the cut, int64 on the host, without sequences that lost all their rows."""
    key = ("offsets", id(offsets))
    if key not in rows.made:
        left = torch.zeros(rows.length + 1, dtype=torch.int64)
        left[rows.index[0].cpu() + 1] = 1
        rows.made[key] = (offsets, left.cumsum(0)[offsets].unique_consecutive())
    return rows.made[key][1]
