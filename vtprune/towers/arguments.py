# SPDX-License-Identifier: Apache-2.0
"""Cuts the arguments of a tower's block, recognized by their shapes, to the rows that are left."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from ..models.arguments import bind


class Offsets:
    """Recognizes offsets of packed sequences (`cu_seqlens`) among the arguments of one tower call; reads each once.

    Args:
        batch, length: Shape `[B, L]` of the tower's states.
    """

    def __init__(self, batch: int, length: int) -> None:
        self.batch, self.length = batch, length
        self._known: dict[int, tuple[Any, Tensor | None]] = {}

    def read(self, value: Any) -> Tensor | None:
        """`value` as `[S + 1]` int64 on the host if it holds offsets from 0 to the number of tokens, else None."""
        if self.batch != 1 or not isinstance(value, Tensor) or value.dim() != 1 or value.is_floating_point():
            return None
        if value.dtype == torch.bool or not 2 <= len(value) <= self.length + 1:
            return None
        if id(value) not in self._known:
            found = value.detach().cpu().long()
            fits = int(found[0]) == 0 and int(found[-1]) == self.length and bool((found.diff() >= 0).all())
            self._known[id(value)] = (value, found if fits else None)
        return self._known[id(value)][1]

    def among(self, values: dict[Any, Any]) -> Tensor | None:
        """The offsets among a block's arguments, or None."""
        return next((o for v in values.values() if (o := self.read(v)) is not None), None)


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
        if self.batch == 1:
            return x.index_select(dim, self.index[0])
        if not of_entries:
            return x.index_select(dim, self.index[0])  # one entry at a time, see `RunningTower`
        x = x.expand(self.batch, *x.shape[1:]) if x.shape[0] == 1 else x
        picked = x.movedim(dim, 1)[self.entries[:, None], self.index] if len(x) == self.batch else None
        if picked is None:  # `x` has the entries of this group only
            picked = x.movedim(dim, 1).gather(1, _like(self.index, x.movedim(dim, 1)))
        return picked.movedim(1, dim)

    def put(self, full: Tensor, rows: Tensor) -> Tensor:
        """Returns states `[B, L, D]` with `rows` `[g, K, D]` written into them."""
        if self.batch == 1:
            return full.index_copy(1, self.index[0], rows)
        return full.index_put((self.entries[:, None], self.index), rows)


def _like(index: Tensor, x: Tensor) -> Tensor:
    return index.reshape(*index.shape, *[1] * (x.dim() - 2)).expand(-1, -1, *x.shape[2:])


def named(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a call by name, including those in `*args` and `**kwargs`."""
    return bind(module.forward, args, kwargs)


def states_of(args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
    """The hidden states among a block's arguments, which come first."""
    value = args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values()), None))
    return value if isinstance(value, Tensor) else None


def with_states(args: tuple, kwargs: dict[str, Any], states: Tensor) -> tuple[tuple, dict[str, Any]]:
    """The arguments with other hidden states."""
    if args:
        return (states, *args[1:]), kwargs
    name = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
    return args, {**kwargs, name: states}


def mask_among(values: dict[str, Any]) -> Tensor | None:
    """The attention mask among a block's arguments, or None.

    Raises:
        UnsupportedModelError: It is one of flex attention.
    """
    found = next((v for name, v in values.items() if "mask" in name and v is not None), None)
    if found is not None and not isinstance(found, Tensor):
        raise UnsupportedModelError(
            f"the mask of the vision tower is a {type(found).__name__}; tower= supports tensors only: load the model "
            'with attn_implementation="sdpa", "eager" or "flash_attention_2"'
        )
    return found


def tables_among(values: dict[str, Any], length: int) -> list[Tensor]:
    """Tensors `[L, ...]` among a block's arguments that are shared by the whole batch, such as rotations."""
    found: list[Tensor] = []
    for name, value in values.items():
        if "mask" not in name:
            map_tensors(value, lambda x: found.append(x) if x.dim() >= 2 and len(x) == length else None)
    return found


def map_tensors(value: Any, function: Any) -> Any:
    """Applies `function` to the tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple):
        return tuple(map_tensors(v, function) for v in value)
    if isinstance(value, list):
        return [map_tensors(v, function) for v in value]
    if isinstance(value, dict):
        return {k: map_tensors(v, function) for k, v in value.items()}
    return value


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
    square = x.dim() >= 2 and x.shape[-1] == x.shape[-2] == rows.length
    if "mask" in name or square:
        dims = [d for d in range(max(0, x.dim() - 2), x.dim()) if x.shape[d] == rows.length]
    else:
        dims = [d for d in range(min(3, x.dim())) if x.shape[d] == rows.length][:1]
        if rows.batch > 1 and dims == [0] and x.dim() > 1 and x.shape[1] == rows.length:
            dims = [1]  # a batch of as many entries as there are rows
    of_entries = x.dim() > 0 and x.shape[0] in (1, rows.batch) and 0 not in dims and x.dim() > 1
    for place, dim in enumerate(dims):
        x = rows.take(x, dim, of_entries) if place == 0 or not of_entries else _again(x, dim, rows)
    if not dims and rows.batch > 1 and x.dim() >= 1 and x.shape[0] == rows.batch:
        x = x[rows.entries]
    return x


def _again(x: Tensor, dim: int, rows: Rows) -> Tensor:
    """Gathers the rows along a second dimension, after the entries were selected with the first."""
    if rows.batch == 1:
        return x.index_select(dim, rows.index[0])
    moved = x.movedim(dim, 1)
    return moved.gather(1, _like(rows.index, moved)).movedim(1, dim)


def cut_offsets(offsets: Tensor, rows: Rows) -> Tensor:
    """Offsets after the cut, int64 on the host, without sequences that lost all their rows."""
    key = ("offsets", id(offsets))
    if key not in rows.made:
        left = torch.zeros(rows.length + 1, dtype=torch.int64)
        left[rows.index[0].cpu() + 1] = 1
        rows.made[key] = (offsets, left.cumsum(0)[offsets].unique_consecutive())
    return rows.made[key][1]
