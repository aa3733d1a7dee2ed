# SPDX-License-Identifier: Apache-2.0
"""Pruned KV caches: state that is kept between the calls of a generation, attached to its cache.

A pruned cache reports the length of the unpruned conversation to callers, `generate` and the model; only its layers
hold fewer tokens. `CacheState` maps the slots of each layer to positions in the conversation, so that masks made for
the unpruned length can be cut down layer by layer. Since the reported length is that of the conversation, position ids
that a model derives from it are the original ones, and continued chats, cropping and hand-written loops work unchanged.

    cache.get_seq_length()        tokens of the conversation, including dropped ones
    cache.get_seq_length(layer)   tokens that the layer holds
"""

from __future__ import annotations

import functools
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..core.transfer import to_device
from ..errors import VTPruneError
from ..models.transformers_names import is_cache
from .positions import Shift

if TYPE_CHECKING:
    from transformers import Cache

_ATTRIBUTE = "_vtprune_state"


class CacheState:
    """State of a pruned KV cache: the positions in the slots of its layers.

    Attributes:
        base: For each layer, the position `[B, P]` in each of its first `P` slots, -1 for slots that must not be
            attended to; None for a layer that was never cut. Slots from `P` on hold consecutive positions.
        length: Length of the conversation when `base` was written.
        shifts: For each layer, the shift of position ids, for methods that renumber.
        held: `[B, V, 2]` position and frame number of the visual tokens in the cache, -1 for none; with `window=` only.
    """

    def __init__(self, base: list[Tensor | None], length: int, shifts: Sequence[Shift | None] = ()) -> None:
        self.base = base
        self.length = length
        self.shifts = list(shifts)
        self.held: Tensor | None = None
        distinct = {id(b): b for b in base if b is not None}  # layers between two cuts share a tensor
        ragged = {name: bool((b < 0).any()) for name, b in distinct.items()}
        self.ragged = [b is not None and ragged[id(b)] for b in base]
        self.open = False  # whether the last call had visual tokens, so that the next one must not add any
        self.reading = False  # whether a call of a patched model that uses the cache is in progress
        self.mark: tuple[int, Tensor] | None = None  # a slot of the last layer, and its keys [B, G, d], see `mark_of`

    def matches(self, keys: Tensor) -> bool:
        """Whether `keys` `[B, G, slots, d]` are the last layer's, up to a cast, judged by the slot in `mark`."""
        if self.mark is None or keys.dim() != 4 or keys.shape[2] <= self.mark[0]:
            return False
        known, found = self.mark[1], keys[:, :, self.mark[0]]
        casts = dict.fromkeys((known.dtype, torch.bfloat16, torch.float16))
        return known.shape == found.shape and any(
            torch.equal(known.to(dtype).to(known), found.to(known)) for dtype in casts
        )

    def copy(self) -> CacheState:
        """Copy that can be changed independently."""
        again = CacheState(list(self.base), self.length, self.shifts)
        again.held = self.held
        return again

    @property
    def is_pruned(self) -> bool:
        """Whether any layer has dropped tokens or renumbered positions."""
        return any(b is not None for b in self.base) or any(s is not None for s in self.shifts)

    @property
    def is_plain(self) -> bool:
        """Whether no slot is hidden and no position turned back: steps without a mask need no other arguments then."""
        return not any(self.ragged) and not any(self.shifts)

    def base_of(self, layer: int) -> Tensor | None:
        """`base` of a layer; None for layers that no prompt has reached."""
        return self.base[layer] if layer < len(self.base) else None

    def shift(self, layer: int) -> Shift | None:
        """Shift of a layer's position ids; None if tokens keep theirs."""
        return self.shifts[layer] if layer < len(self.shifts) else None

    def removed(self, layer: int) -> int:
        """Number of tokens that the layer has dropped."""
        base = self.base_of(layer)
        return 0 if base is None else self.length - base.shape[1]

    def is_ragged(self, layer: int) -> bool:
        """Whether some slots of the layer must not be attended to."""
        return layer < len(self.ragged) and self.ragged[layer]

    def slots(self, layer: int, count: int) -> Tensor | None:
        """Positions `[B, count]` in the slots of a layer that holds `count` of them; None if slots equal positions."""
        base = self.base_of(layer)
        if base is None:
            return None
        if count <= base.shape[1]:
            return base[:, :count]
        tail = torch.arange(count - base.shape[1], device=base.device) + self.length
        return torch.cat([base, tail.expand(base.shape[0], -1)], 1)

    def select(self, rows: Tensor) -> None:
        """Selects rows of the batch."""
        self._map(lambda x: x[to_device(rows, x.device)])

    def repeat(self, repeats: int) -> None:
        """Repeats every row of the batch."""
        self._map(lambda x: x.repeat_interleave(repeats, 0))

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        done: dict[int, Any] = {}  # layers that share a tensor keep sharing it
        self.held = None if self.held is None else function(self.held)
        self.base = [b if b is None else done.setdefault(id(b), function(b)) for b in self.base]
        self.shifts = [s if s is None else done.setdefault(id(s), s.map(function)) for s in self.shifts]


def state_of(cache: Cache | None) -> CacheState | None:
    """The state of a pruned cache; None for any other cache, and for one that was emptied."""
    if cache is None or not isinstance(cache, PrunedCache):
        return None
    state = cache._vtprune_state
    if _slots_filled(cache, _first(cache)) == 0:
        detach(cache)
        return None
    return state


def recover_state(cache: Cache | None, recent: Iterable[CacheState]) -> CacheState | None:
    """The state of a cache that was rebuilt from the layers or tensors of a pruned one; None for any other.

    Args:
        cache: Any cache; checked when it is first seen.
        recent: States of the last prefills, by which tensors are recognized.

    Raises:
        VTPruneError: The layers hold different numbers of tokens, and their positions are unknown.
    """
    if cache is None or not hasattr(cache, "layers"):
        return None
    attending = [i for i, layer in enumerate(cache.layers) if cached_tokens(cache, i)]
    if not attending:
        return None
    state = getattr(cache.layers[attending[0]], _ATTRIBUTE, None)
    keys = getattr(cache.layers[attending[-1]], "keys", None)
    if state is None and isinstance(keys, Tensor):
        state = next((known for known in recent if known.matches(keys)), None)
    if state is not None:
        attach(cache, state.copy())
        return state_of(cache)
    counts = {cached_tokens(cache, i) for i in attending}
    if len(counts) > 1:
        raise VTPruneError(
            f"the layers of this cache hold {min(counts)} to {max(counts)} tokens: it was made from parts of a pruned "
            "cache, and the positions of its tokens are lost; copy or store the cache object itself (copy.deepcopy, "
            "pickle, torch.save)"
        )
    return None


def _first(cache: Any) -> int:
    """The layer whose length is that of the whole cache: the first that holds keys and values."""
    for number, layer in enumerate(cache.layers):
        if hasattr(layer, "get_seq_length"):
            return number
    return 0


def _slots_filled(cache: Any, layer: int) -> int:
    plain = cache.plain if isinstance(cache, PrunedCache) else type(cache)
    return int(plain.get_seq_length(cache, layer))


def cached_tokens(cache: Any, layer: int) -> int:
    """Number of tokens that a layer of a cache has stored, without dropped ones; 0 without a cache."""
    if cache is None or layer >= len(cache.layers) or not hasattr(cache.layers[layer], "get_seq_length"):
        return 0
    return int(cache.layers[layer].get_seq_length())


def length(cache: Cache | None) -> int:
    """Length of the conversation in a cache, including dropped tokens."""
    return 0 if cache is None else int(cache.get_seq_length())


class Caches:
    """The caches that a patched model was called with.

    Attributes:
        recent: States of the last prefills, by which caches that were rebuilt from their tensors are recognized.
    """

    def __init__(self) -> None:
        self.recent: deque[CacheState] = deque(maxlen=2)
        self._plain: weakref.WeakSet[Any] = weakref.WeakSet()  # caches known not to be pruned

    def state_of(self, cache: Any) -> CacheState | None:
        """The state of a pruned cache, or of one rebuilt from it; None for any other."""
        state = state_of(cache)
        if state is not None or not is_cache(cache) or cache in self._plain:
            return state
        state = recover_state(cache, self.recent)
        if state is None:
            self._plain.add(cache)
        return state


def mark_of(cache: Cache) -> tuple[int, Tensor] | None:
    """Last slot of the last layer and its keys `[B, G, d]`, which depend on all tokens and so identify the cache."""
    layer = next((x for x in reversed(cache.layers) if hasattr(x, "get_seq_length")), None)
    keys = getattr(layer, "keys", None)
    if layer is None or not isinstance(keys, Tensor) or keys.dim() != 4 or getattr(layer, "is_sliding", True):
        return None
    slot = int(layer.get_seq_length()) - 1
    return (slot, keys[:, :, slot].detach().clone()) if 0 <= slot < keys.shape[2] else None


def attach(cache: Cache, state: CacheState) -> None:
    """Makes `cache` a pruned cache with the given state."""
    if not isinstance(cache, PrunedCache):
        cache.__class__ = _pruned_class(type(cache))  # type: ignore[arg-type]
    setattr(cache, _ATTRIBUTE, state)
    for layer in cache.layers:  # so that a cache that is rebuilt from these layers is recognized
        setattr(layer, _ATTRIBUTE, state)


def detach(cache: Cache) -> None:
    """Makes a pruned cache an ordinary one again."""
    if isinstance(cache, PrunedCache):
        cache.__class__ = type(cache).plain
    for holder in (cache, *cache.layers):
        vars(holder).pop(_ATTRIBUTE, None)


@functools.cache
def _pruned_class(plain: type) -> type:
    """The class of pruned caches that were of class `plain`."""
    return type(f"Pruned{plain.__name__}", (PrunedCache, plain), {"plain": plain})


def _restored(plain: type) -> Any:
    """An empty cache for `pickle` and `copy` to fill."""
    made = _pruned_class(plain)
    return object.__new__(made)


class PrunedCache:
    """Mixin of pruned caches, which report the length of the unpruned conversation.

    The class of a cache object becomes a subclass of this one and of its own class, so that the object can be copied,
    pickled and stored like any other; `detach` restores its own class.

    Attributes:
        plain: The cache's own class.
    """

    plain: ClassVar[Any]
    _vtprune_state: CacheState
    layers: list[Any]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _restored, (type(self).plain,), vars(self).copy()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(columns={self.get_seq_length()}, layers={len(self.layers)})"

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Adds keys and values; refused outside calls of a patched model, which would use slots as positions."""
        if not self._vtprune_state.reading and self._vtprune_state.is_pruned:
            raise VTPruneError(
                "this KV cache was pruned, but the model that uses it is not patched (any more) and would give new "
                "tokens wrong positions; patch the model (ratio=1.0 prunes nothing more), and keep the patch as long "
                "as the cache"
            )
        return super().update(*args, **kwargs)  # type: ignore[misc]

    def get_seq_length(self, layer_idx: int | None = None) -> int:
        """Length of the conversation; with `layer_idx`, the number of tokens that the layer holds."""
        if layer_idx is not None:
            return _slots_filled(self, layer_idx)
        first = _first(self)
        count, state = _slots_filled(self, first), state_of(self)
        return count if state is None else count + state.removed(first)

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Position of the next query; masks are made for the whole conversation and cut down at the layers."""
        return self.get_seq_length()

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and offset of a mask over the whole conversation."""
        if not hasattr(self.layers[layer_idx], "get_seq_length"):
            layer_idx = _first(self)  # transformers before 5.23 asks for layer 0, which may have no attention
        if getattr(self.layers[layer_idx], "is_compileable", False) and not self.layers[layer_idx].is_sliding:
            return super().get_mask_sizes(query_length, layer_idx)  # type: ignore[misc]
        return self.get_seq_length() + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Removes tokens from the end; inside a pruned prompt, each layer loses those of them that it holds."""
        state = state_of(self)
        if state is None or tokens_to_remove == 0:
            type(self).plain.crop(self, tokens_to_remove)
            return
        if tokens_to_remove > 0:
            tokens_to_remove -= self.get_seq_length()  # a positive argument is the new length
        end = self.get_seq_length() + tokens_to_remove
        if end >= state.length:
            type(self).plain.crop(self, tokens_to_remove)
            return
        base: list[Tensor | None] = []
        for i, layer in enumerate(self.layers):
            slots = state.slots(i, cached_tokens(self, i))
            stays = None if slots is None else (slots < end) & (slots >= 0)
            left = end if stays is None else int(stays[0].sum())
            order = torch.arange(0 if stays is None else stays.shape[1], device=None if stays is None else stays.device)
            if stays is not None and not bool((stays == (order < left)).all()):
                raise VTPruneError(
                    "crop removes part of a pruned prompt from a batch whose samples keep different numbers of tokens; "
                    "crop only tokens after the prompt, or generate the samples one by one"
                )
            layer.crop(left - cached_tokens(self, i))
            whole = slots is None or bool((slots[:, :left] == order[:left]).all())
            base.append(None if whole or slots is None else slots[:, :left])
        if all(b is None for b in base) and not any(state.shifts) and state.held is None:
            detach(self)  # the remaining tokens are those of an unpruned cache
            return
        left_over = CacheState(base, end, state.shifts)
        if state.held is not None:
            left_over.held = state.held.masked_fill(state.held[..., :1] >= end, -1)
        attach(self, left_over)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Selects the rows of the batch that beam search continues."""
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._vtprune_state.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps some rows of the batch."""
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._vtprune_state.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row of the batch."""
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self._vtprune_state.repeat(repeats)

    def reset(self) -> None:
        """Empties the cache."""
        super().reset()  # type: ignore[misc]
        detach(self)
