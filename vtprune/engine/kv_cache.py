# SPDX-License-Identifier: Apache-2.0
"""What has to be remembered between calls: it lives with the KV cache of its generation, and dies with it.

Callers, `generate` and the model's own bookkeeping go on counting columns of the unpruned conversation: to them a
pruned cache reports the length it would have had. Only its layers hold less. `CacheState` knows which column sits in
which slot of which layer, so that masks made for the unpruned length can be cut down layer by layer. Because the
reported length is the true one, position ids that a model derives from it are the original ones, and continued chats,
cropping and hand-written loops need nothing more.

    cache.get_seq_length()        columns of the conversation, dropped ones included
    cache.get_seq_length(layer)   slots that the layer really holds
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core.transfer import to_device
from ..errors import VTPruneError
from .positions import Shift

if TYPE_CHECKING:
    from transformers import Cache

_ATTRIBUTE = "_vtprune_state"


class CacheState:
    """Slots of a pruned KV cache.

    Attributes:
        base: For each layer `[B, P]` the column in each of its first `P` slots, -1 where nothing may be attended to;
            None for a layer that was never cut. Slots from `P` on hold consecutive columns.
        length: Columns of the conversation when `base` was written.
        shifts: For each layer how far positions are turned back, for methods that renumber.
        held: `[B, V, 2]` column and frame number of the visual tokens in the cache, -1 for none; for streams only.
    """

    def __init__(self, base: list[Tensor | None], length: int, shifts: Sequence[Shift | None] = ()) -> None:
        self.base = base
        self.length = length
        self.shifts = list(shifts)
        self.held: Tensor | None = None
        self.ragged = [bool((b < 0).any()) if b is not None else False for b in base]

    def base_of(self, layer: int) -> Tensor | None:
        """`base` of a layer; layers that no prompt passed have none."""
        return self.base[layer] if layer < len(self.base) else None

    def shift(self, layer: int) -> Shift | None:
        """How far a layer's positions are turned back; None where kept tokens keep theirs."""
        return self.shifts[layer] if layer < len(self.shifts) else None

    def removed(self, layer: int) -> int:
        """How many columns the layer has lost."""
        base = self.base_of(layer)
        return 0 if base is None else self.length - base.shape[1]

    def is_ragged(self, layer: int) -> bool:
        """Whether some slots of the layer must not be attended to."""
        return layer < len(self.ragged) and self.ragged[layer]

    def slots(self, layer: int, count: int) -> Tensor | None:
        """`[B, count]` columns in the slots of a layer that holds `count` of them; None if slot and column are the
        same."""
        base = self.base_of(layer)
        if base is None:
            return None
        if count <= base.shape[1]:
            return base[:, :count]
        tail = torch.arange(count - base.shape[1], device=base.device) + self.length
        return torch.cat([base, tail.expand(base.shape[0], -1)], 1)

    def select(self, rows: Tensor) -> None:
        """Reorders the batch."""
        self._map(lambda x: x[to_device(rows, x.device)])

    def repeat(self, repeats: int) -> None:
        """Repeats every row of the batch."""
        self._map(lambda x: x.repeat_interleave(repeats, 0))

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        done: dict[int, Any] = {}  # layers of one stage share their tensors, and shall go on sharing them
        self.held = None if self.held is None else function(self.held)
        self.base = [b if b is None else done.setdefault(id(b), function(b)) for b in self.base]
        self.shifts = [s if s is None else done.setdefault(id(s), s.map(function)) for s in self.shifts]


def state_of(cache: Cache | None) -> CacheState | None:
    """The state of a pruned cache; None for any other cache, and for one that was emptied since."""
    state = getattr(cache, _ATTRIBUTE, None)
    if state is not None and cache is not None and _slots_filled(cache, _first(cache)) == 0:
        detach(cache)
        return None
    return state


def _first(cache: Cache) -> int:
    """The layer that stands for the whole cache where no layer is named: the first that attends."""
    return next((i for i, layer in enumerate(cache.layers) if hasattr(layer, "get_seq_length")), 0)


def _slots_filled(cache: Cache, layer: int) -> int:
    return int(type(cache).get_seq_length(cache, layer))


def cached_tokens(cache: Cache | None, layer: int) -> int:
    """Tokens that passed into a layer of a cache, pruned ones not counted; 0 without a cache."""
    if cache is None or layer >= len(cache.layers) or not hasattr(cache.layers[layer], "get_seq_length"):
        return 0
    return int(cache.layers[layer].get_seq_length())


def length(cache: Cache | None) -> int:
    """Columns of the conversation that a cache stands for."""
    return 0 if cache is None else int(cache.get_seq_length())


def attach(cache: Cache, state: CacheState) -> None:
    """Makes `cache` report columns of the conversation, as `state` says."""
    setattr(cache, _ATTRIBUTE, state)
    for function in (
        get_seq_length,
        get_query_offset,
        get_mask_sizes,
        crop,
        reorder_cache,
        batch_repeat_interleave,
        batch_select_indices,
        reset,
    ):
        if hasattr(type(cache), function.__name__):
            setattr(cache, function.__name__, MethodType(function, cache))


def detach(cache: Cache) -> None:
    """Makes a cache an ordinary one again."""
    for name in [n for n, value in vars(cache).items() if isinstance(value, MethodType) or n == _ATTRIBUTE]:
        if name == _ATTRIBUTE or getattr(vars(cache)[name], "__func__", None) is globals().get(name):
            delattr(cache, name)


# The functions below replace methods of the same name on one cache object.


def get_seq_length(self: Cache, layer_idx: int | None = None) -> int:
    """Columns of the conversation, or, for a layer that is named, the slots it holds."""
    if layer_idx is not None:
        return type(self).get_seq_length(self, layer_idx)
    first = _first(self)
    count = type(self).get_seq_length(self, first)
    state = state_of(self)
    return count if state is None else count + state.removed(first)


def get_query_offset(self: Cache, layer_idx: int = 0) -> int:
    """Column of the next query: masks are made for the whole conversation and cut down at the layers."""
    return get_seq_length(self)


def get_mask_sizes(self: Cache, query_length: int, layer_idx: int) -> tuple[int, int]:
    """Length and offset of a mask over the whole conversation."""
    if not hasattr(self.layers[layer_idx], "get_seq_length"):
        layer_idx = _first(self)  # transformers 5.17 asks for layer 0 of any decoder, which in a hybrid may not attend
    if getattr(self.layers[layer_idx], "is_compileable", False) and not self.layers[layer_idx].is_sliding:
        return type(self).get_mask_sizes(self, query_length, layer_idx)
    return int(get_seq_length(self)) + query_length, 0


def crop(self: Cache, tokens_to_remove: int) -> None:
    """Takes columns off the end; inside a pruned prompt each layer loses those of them it still has."""
    state = state_of(self)
    if state is None or tokens_to_remove == 0:
        type(self).crop(self, tokens_to_remove)
        return
    if tokens_to_remove > 0:
        tokens_to_remove -= int(get_seq_length(self))  # the size that shall be left
    end = int(get_seq_length(self)) + tokens_to_remove
    if end >= state.length:
        type(self).crop(self, tokens_to_remove)
        return
    base: list[Tensor | None] = []
    for i, layer in enumerate(self.layers):
        slots = state.slots(i, cached_tokens(self, i))
        stays = None if slots is None else (slots < end) & (slots >= 0)
        left = end if stays is None else int(stays[0].sum())
        if stays is not None and not bool((stays == (torch.arange(stays.shape[1], device=stays.device) < left)).all()):
            raise VTPruneError(
                "crop goes into the pruned part of a batch whose samples keep different numbers of tokens; crop only "
                "what "
                "came after the prompt, or generate the samples one by one"
            )
        layer.crop(left - cached_tokens(self, i))
        base.append(None if slots is None else slots[:, :left])
    left_over = CacheState(base, end, state.shifts)
    if state.held is not None:
        left_over.held = state.held.masked_fill(state.held[..., :1] >= end, -1)
    attach(self, left_over)


def reorder_cache(self: Cache, beam_idx: Tensor) -> None:
    """Beam search."""
    type(self).reorder_cache(self, beam_idx)
    getattr(self, _ATTRIBUTE).select(beam_idx)


def batch_select_indices(self: Cache, indices: Tensor) -> None:
    """Keeps some rows of the batch."""
    type(self).batch_select_indices(self, indices)
    getattr(self, _ATTRIBUTE).select(indices)


def batch_repeat_interleave(self: Cache, repeats: int) -> None:
    """Repeats every row of the batch."""
    type(self).batch_repeat_interleave(self, repeats)
    getattr(self, _ATTRIBUTE).repeat(repeats)


def reset(self: Cache) -> None:
    """Empties the cache."""
    type(self).reset(self)
    detach(self)
