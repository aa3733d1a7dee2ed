# SPDX-License-Identifier: Apache-2.0
"""The prompt positions that the layers of a decoder hold during one call, and their slots in the KV cache."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from . import gather, kv_cache, positions
from .cache_state import CacheMark, CacheState

Layout = tuple[Tensor, Tensor]  # index and validity of a packed layout, see `gather`


class Columns:
    """The prompt positions that are left in one decoder call.

    Attributes:
        batch, length: Shape `[B, T]` of the call.
        past: Length of the conversation before it.
        real: `[B, T]` bool, False for padding; all True if not given.
        state: State of a cache that earlier calls pruned, or None.
        cache: The KV cache, known from the first layer on.
        index, valid: The current packed layout (see `gather`), `[B, K]` on the CPU.
        source: Prompt positions `[B, K]` that rotations and position ids are taken from; not `index` if renumbered.
        is_cut: Whether this call has dropped positions.
        is_modified: Whether layers need other arguments than the decoder passes.
        ragged: Whether samples keep different numbers of positions, so that layers see padding.
        shift, shifts: Shift of position ids by the latest cut and by every layer, for methods that renumber.

    Args:
        renumber: Whether kept tokens are numbered through, instead of keeping their positions.
        mixing: Whether layers mix neighboring columns (convolutions, linear attention), so that padding stays in place.
        padded: Whether there may be padding.
        uncut: The layout before any cut, where prompts of the same layout share it.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        real: Tensor | None,
        past: int,
        state: CacheState | None,
        cache: Any,
        renumber: bool,
        mixing: bool,
        padded: bool = True,
        uncut: Layout | None = None,
    ) -> None:
        self.batch, self.length = shape
        self.past, self.state, self.cache = past, state, cache
        if real is not None:
            self.real = real
        if uncut is not None:
            self._uncut = uncut
        self.is_cut, self.ragged, self.is_modified = False, False, state is not None
        self.is_plain = state is None or state.is_plain
        self._renumber, self._mixing, self._padded = renumber, mixing, padded
        self._layouts: list[Layout | None] = []  # of every layer that ran; None before the first cut
        self.shift: positions.Shift | None = None
        self.shifts: list[positions.Shift | None] = []

    # Cached, because decoding steps, the most frequent calls, never need these.

    @functools.cached_property
    def real(self) -> Tensor:
        return torch.ones(self.batch, self.length, dtype=torch.bool)

    @functools.cached_property
    def _uncut(self) -> Layout:
        return gather.all_positions(self.batch, self.length)

    @functools.cached_property
    def index(self) -> Tensor:
        return self._uncut[0]

    @functools.cached_property
    def valid(self) -> Tensor:
        return self._uncut[1]

    @functools.cached_property
    def source(self) -> Tensor:
        return self.index

    @property
    def layers(self) -> int:
        """Number of layers that ran."""
        return len(self._layouts)

    def layout_of(self, layer: int) -> Layout:
        """The packed layout of a layer that ran."""
        return self._layouts[layer] or self._uncut

    @property
    def slot_counts(self) -> list[int]:
        """Number of slots of every layer that ran."""
        return [self.length if layout is None else layout[0].shape[1] for layout in self._layouts]

    def slot_of_position(self) -> Tensor:
        """Slot `[B, T]` of each prompt position, -1 for dropped ones."""
        return slot_of_position(self.index, self.valid, self.length) if self.is_cut else self.index

    def keep(self, stays: Tensor, rotation: Any) -> Tensor:
        """Drops all positions but `stays`.

        Args:
            stays: `[B, T]` bool, a subset of the current positions.
            rotation: The decoder's `position_embeddings` for all positions; needed to renumber.

        Returns:
            Tensor: `[B, K]` the old slot of each new slot.
        """
        slot = self.slot_of_position() if self.is_cut else None
        self.index, self.valid = gather.pack(stays, self.real if self._padded else None, self._mixing)
        self.is_cut = self.is_modified = True
        self.ragged = self.batch > 1 and not bool(self.valid.all())  # one row fills all slots
        self.source = self.index
        if self._renumber:
            self.source = positions.sources(self.index, self.real)
            self.shift = positions.shift_of(rotation, self.real, self.index)
        return self.index if slot is None else slot.gather(1, self.index).clamp(min=0)

    def record_layer(self, number: int) -> None:
        """Records that layer `number` runs on the current packed layout."""
        self._layouts.append((self.index, self.valid) if self.is_cut else None)
        if self.shift is None and self.is_plain:
            self.shifts.append(None)
            return
        old = self.state.shift(number) if self.state is not None else None
        both = old.plus(self.shift) if old is not None and self.shift is not None else (old or self.shift)
        self.shifts.append(both)

    def slot_positions(self, number: int, cached: int, layout: Layout) -> Tensor:
        """Positions `[B, cached + K]` in the slots of a layer, -1 for invalid ones, after the packed layout was added
        to the `cached` slots of earlier calls."""
        index, valid = layout
        new = index + self.past if self.past else index
        new = torch.where(valid, new, -1) if self.batch > 1 else new
        if cached <= 0:
            return new
        before = self.state.slots(number, cached) if self.state is not None else None
        return torch.cat([torch.arange(cached).expand(self.batch, -1) if before is None else before, new], 1)

    def state_after(self) -> CacheState:
        """State of the cache after this call: slots and shifts of every layer."""
        made: dict[Any, Tensor | None] = {}  # layers between two cuts share a tensor
        bases: list[Tensor | None] = []
        for number, layout in enumerate(self._layouts):
            old = self.state.base_of(number) if self.state is not None else None
            if layout is None and old is None:
                bases.append(None)
                continue
            index, valid = layout = layout or self._uncut
            cached = kv_cache.cached_tokens(self.cache, number) - index.shape[1]
            key = (id(index), id(old), cached)
            if key not in made:
                whole = old is None and index.shape[1] == self.length and bool(valid.all())
                made[key] = None if whole else self.slot_positions(number, cached, layout)
            bases.append(made[key])
        may_hide = self.batch > 1 or self.state is not None
        state = CacheState(bases, self.past + self.length, self.shifts, may_hide)
        state.mark = CacheMark.of(self.cache)
        return state


def slot_of_position(index: Tensor, valid: Tensor, length: int) -> Tensor:
    """Inverts a packed layout: slot `[B, length]` of each position, -1 for dropped positions."""
    slot = torch.full((index.shape[0], length + 1), -1)
    slot.scatter_(1, torch.where(valid, index, length), torch.arange(index.shape[1]).expand_as(index))
    return slot[:, :length]
