# SPDX-License-Identifier: Apache-2.0
"""The attention mask of a layer over the slots that are left in its cache."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..models.attended import is_block_mask
from ..models.transformers_names import WINDOW
from . import kv_cache, masks
from .columns import Columns
from .masks import AttentionForm


@dataclass
class AttendedSlots:
    """Slots that a layer attends to.

    Attributes:
        positions: `[B, k]` the position in each slot.
        valid: `[B, k]` False for slots that are empty or must not be attended to.
        hides: Whether a filled slot must not be attended to.
    """

    positions: Tensor
    valid: Tensor
    hides: bool


class LayerMasks:
    """Translates masks for the layers that run on the current layout of `columns`, each mask once.

    Args:
        columns: The positions that are left.
        form: Makes the form of mask that the decoder takes, for layers that are given none.
        on_device: Copies a tensor to a device.
    """

    def __init__(
        self,
        columns: Columns,
        form: Callable[[], AttentionForm],
        on_device: Callable[[Tensor, torch.device], Tensor],
    ) -> None:
        self.columns, self._make_form, self._on_device = columns, form, on_device
        self._slots: dict[tuple, AttendedSlots] = {}
        self._masks: dict[tuple, tuple[Any, AttendedSlots, Any]] = {}  # with their sources, so that ids stay unique

    @functools.cached_property
    def form(self) -> AttentionForm:
        """The form of mask that the decoder takes."""
        return self._make_form()

    def of_layer(self, number: int, mask: Any) -> Any:
        """The mask of layer `number` instead of the decoder's `mask` for all positions; None if it needs none."""
        columns, state = self.columns, self.columns.state
        if mask is None and not columns.ragged and not (state is not None and state.is_ragged(number)):
            return None
        slots = self._attended(number)
        if mask is None and not slots.hides:
            return None
        both_ways = mask is None and number in self.form.both_ways
        key = (id(mask), id(slots), both_ways)
        if key not in self._masks:
            made = self._translated(mask, slots, both_ways)
            prompt = kv_cache.lasting_prompt(columns.cache, number) if state is not None and columns.length > 1 else 0
            if prompt and isinstance(made, Tensor) and made.dim() == 4:  # the model's own mask has no such window
                window = getattr(columns.cache.layers[number], WINDOW)
                queries = self._on_device(columns.index + columns.past, made.device)
                made = masks.windowed(made, queries, slots.positions, window, prompt)
            self._masks[key] = (mask, slots, made)
        return self._masks[key][2]

    def _translated(self, mask: Any, slots: AttendedSlots, both_ways: bool) -> Any:
        columns, keys, valid = self.columns, slots.positions, slots.valid
        if mask is None:
            queries = columns.index + columns.past
            queries = torch.full_like(queries, columns.past + columns.length) if both_ways else queries
            return masks.causal_in_form(self.form, queries, keys, valid)
        rows = columns.index if columns.is_cut else None
        if is_block_mask(mask):
            return masks.translate_block_mask(mask, rows, keys, valid)
        only_new = mask.dim() == 2 and mask.shape[1] == columns.length  # a mask of this call's positions
        if only_new and (columns.past or keys.shape[1] > columns.index.shape[1]):
            keys, valid = columns.index, columns.valid
        rows = None if rows is None else self._on_device(rows, mask.device)
        return masks.translate_mask(mask, rows, *(self._on_device(x, mask.device) for x in (keys, valid)))

    def _attended(self, number: int) -> AttendedSlots:
        """The slots that layer `number` attends to."""
        columns, cache, state = self.columns, self.columns.cache, self.columns.state
        cached = kv_cache.cached_tokens(cache, number)
        queries = columns.index.shape[1] if columns.is_cut else columns.length
        count, start = cached + queries, 0
        if cache is not None and number < len(cache.layers) and hasattr(cache.layers[number], "get_mask_sizes"):
            count, start = map(int, cache.layers[number].get_mask_sizes(queries))
        key = (id(state.base_of(number)) if state is not None else 0, cached, count, start)
        if key not in self._slots:
            filled = columns.slot_positions(number, cached, (columns.index, columns.valid))
            filled = kv_cache.slots_attended(filled, kv_cache.lasting_prompt(cache, number), start, count)
            hides = bool((filled < 0).any())
            # A static cache includes empty slots.
            filled = nn.functional.pad(filled, (0, count - filled.shape[1]), value=-1)
            self._slots[key] = AttendedSlots(filled.clamp(min=0), filled >= 0, hides)
        return self._slots[key]
