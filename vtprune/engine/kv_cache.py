# SPDX-License-Identifier: Apache-2.0
"""Pruned KV caches, which report the length of the unpruned conversation; only their layers hold fewer tokens.

So position ids that a model derives from the length are the original ones, and continued chats, cropping and
hand-written loops work unchanged. The layers carry the state (`CacheState`), so that it goes with them into a copy, a
file or another cache object.

    cache.get_seq_length()        tokens of the conversation, including dropped ones
    cache.get_seq_length(layer)   tokens that the layer holds
"""

from __future__ import annotations

import functools
import weakref
from abc import ABC
from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..errors import VTPruneError
from ..models.transformers_names import PROMPT_LENGTH, WINDOW, is_cache
from ..report.cost import LayerSize
from .cache_state import CacheState

if TYPE_CHECKING:
    from transformers import Cache

_STATE, _NUMBER = "_vtprune_state", "_vtprune_number"  # attributes of the layers of a pruned cache


def state_of(cache: Any) -> CacheState | None:
    """The state of a cache with the layers of a pruned one; None for any other cache, and for one that was emptied.

    Raises:
        VTPruneError: Only some of the layers are those of a pruned cache, or they were cropped differently.
    """
    layers = getattr(cache, "layers", None) or []
    first = _first(cache) if layers else 0
    state: CacheState | None = getattr(layers[first], _STATE, None) if layers else None
    if state is None or _slots_filled(cache, first) == 0:  # never pruned, or emptied
        if isinstance(cache, PrunedCache):
            detach(cache)
        return None
    if not isinstance(cache, PrunedCache):
        known = [getattr(layer, _STATE, None) for layer in layers if hasattr(layer, "get_seq_length")]
        if any(other is None or other.length != state.length for other in known):
            raise VTPruneError(
                "only some layers of this cache are those of a pruned cache, so the positions of its tokens are lost; "
                "copy or store the cache object itself (copy.deepcopy, pickle, torch.save)"
            )
        attach(cache, state)
    return state


def recover_state(cache: Any, recent: Iterable[CacheState]) -> CacheState | None:
    """The state of a cache that was rebuilt from the tensors of a pruned one; None for any other.

    Args:
        cache: Any cache without state; checked when it is first seen.
        recent: States of the last prefills, by which tensors are recognized.

    Raises:
        VTPruneError: The layers hold different numbers of tokens, and their positions are unknown.
    """
    if cache is None or not hasattr(cache, "layers"):
        return None
    attending = [i for i, layer in enumerate(cache.layers) if cached_tokens(cache, i)]
    if not attending:
        return None
    keys = getattr(cache.layers[attending[-1]], "keys", None)
    if isinstance(keys, Tensor):
        for known in recent:
            if known.mark is not None and known.mark.is_in(keys):
                attach(cache, known.copy())
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


def layer_sizes(cache: Any, layers: int) -> list[LayerSize]:
    """What each of a decoder's layers keeps in a cache; nothing for those that share another's keys and values or have
    no attention."""
    sizes = []
    for number in range(layers):  # once a prefill, so without functions for each layer
        layer: Any = cache.layers[number] if number < len(cache.layers) else None
        size: int | None = 0
        for part in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            if part.__class__ is Tensor and size is not None:  # quantized ones have other dimensions
                size = size + part.shape[1] * part.shape[3] * part.element_size() if part.dim() == 4 else None
        most: int | None = None
        if getattr(layer, "is_sliding", False) and not getattr(layer, PROMPT_LENGTH, None):
            window = getattr(layer, WINDOW, None)
            most = int(layer.max_cache_len) if window is None else window - 1
        sizes.append((size, most))
    return sizes


def lasting_prompt(cache: Any, layer: int) -> int:
    """Number of first slots that a layer's sliding window never leaves behind; 0 for the windows of most models."""
    if cache is None or layer >= len(cache.layers):
        return 0
    return getattr(cache.layers[layer], PROMPT_LENGTH, None) or 0


def slots_attended(slots: Tensor, prompt: int, gone: int, count: int) -> Tensor:
    """The `count` of all `slots` `[B, n]` that a layer attends to.

    Args:
        slots: Of all tokens that the layer has seen.
        prompt: First slots that are never forgotten, see `lasting_prompt`.
        gone: Slots after them that a sliding window has left behind.
        count: Slots to attend to.
    """
    window = slots[:, prompt + gone : gone + count]
    return torch.cat([slots[:, :prompt], window], 1) if prompt and gone else slots[:, gone : gone + count]


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


def attach(cache: Cache, state: CacheState) -> None:
    """Makes `cache` a pruned cache with the given state."""
    _become_pruned(cache, PrunedCache)
    for number, layer in enumerate(cache.layers):
        if hasattr(layer, "get_seq_length"):
            _become_pruned(layer, PrunedLayer)
            setattr(layer, _STATE, state)
            setattr(layer, _NUMBER, number)


def detach(cache: Cache) -> None:
    """Makes a pruned cache an ordinary one again."""
    for part in (cache, *cache.layers):
        _become_plain(part)


def plain_class(part: Any) -> type:
    """The own class of a cache or a layer, whether pruned or not."""
    return part.plain if isinstance(part, (PrunedCache, PrunedLayer)) else type(part)


def _become_pruned(part: Any, mixin: type) -> None:
    if not isinstance(part, (PrunedCache, PrunedLayer)):
        part.__class__ = _pruned_class(mixin, type(part))  # type: ignore[arg-type]


def _become_plain(part: Any) -> None:
    part.__class__ = plain_class(part)
    for name in (_STATE, _NUMBER):
        vars(part).pop(name, None)


@functools.cache
def _pruned_class(mixin: type, plain: type) -> type:
    """The class of pruned caches, or of layers of such, that were of class `plain`."""
    # Transformers registers classes of layers by their `_layer_type`.
    return type(f"Pruned{plain.__name__}", (mixin, plain), {"plain": plain, "_layer_type": None})


def _restored(mixin: type, plain: type) -> Any:
    """An empty cache or layer for `pickle` and `copy` to fill."""
    made = _pruned_class(mixin, plain)
    return object.__new__(made)


def _reduce(self: Any, protocol: Any) -> Any:
    """`__reduce_ex__` of pruned caches and layers: their classes are made again when they are loaded."""
    return _restored, type(self).__bases__, vars(self).copy()


# The class of a pruned object becomes a subclass of a mixin and of its own class (`plain`), so that the object can be
# copied, pickled and stored like any other; `detach` restores its own class.


class PrunedLayer(ABC):  # as layers are: otherwise Python does not let an object change its class
    """Mixin of the layers of pruned caches, which carry the state wherever they go.

    Attributes:
        plain: The layer's own class.
    """

    plain: ClassVar[Any]
    __reduce_ex__ = _reduce
    _vtprune_state: CacheState
    _vtprune_number: int

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Adds keys and values; refused outside calls of a patched model, which would use slots as positions."""
        if not self._vtprune_state.calls and self._vtprune_state.is_pruned:
            raise VTPruneError(
                "this KV cache was pruned, but the model that uses it is not patched (any more) and would give new "
                "tokens wrong positions; patch the model (ratio=1.0 prunes nothing more), and keep the patch as long "
                "as the cache"
            )
        return super().update(*args, **kwargs)  # type: ignore[misc]

    def crop(self, tokens_to_remove: int) -> None:
        """Removes positions from the end of the conversation, of which the layer may hold fewer tokens."""
        state, plain = self._vtprune_state, type(self).plain
        held = plain.get_seq_length(self)
        total = held + state.removed(self._vtprune_number)
        end = tokens_to_remove if tokens_to_remove > 0 else total + tokens_to_remove  # positive: the new length
        if end >= state.length:
            plain.crop(self, end - total)
            return
        after = state.cropped(end)
        plain.crop(self, end - after.removed(self._vtprune_number) - held)
        if after.is_pruned or after.visual is not None:
            self._vtprune_state = after
        else:
            _become_plain(self)  # the remaining tokens are those of an unpruned cache

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Selects the rows of the batch that beam search continues."""
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._vtprune_state = self._vtprune_state.selected(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps some rows of the batch."""
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._vtprune_state = self._vtprune_state.selected(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row of the batch."""
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self._vtprune_state = self._vtprune_state.repeated(repeats)

    def reset(self) -> None:
        """Empties the layer."""
        super().reset()  # type: ignore[misc]
        _become_plain(self)


class PrunedCache:
    """Mixin of pruned caches, which report the length of the unpruned conversation.

    Attributes:
        plain: The cache's own class.
    """

    plain: ClassVar[Any]
    __reduce_ex__ = _reduce
    layers: list[Any]

    def __repr__(self) -> str:
        return f"{type(self).__name__}(columns={self.get_seq_length()}, layers={len(self.layers)})"

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
        if not self.layers:
            return super().get_mask_sizes(query_length, layer_idx)  # type: ignore[misc]
        if not hasattr(self.layers[layer_idx], "get_seq_length"):
            layer_idx = _first(self)  # transformers before 5.23 asks for layer 0, which may have no attention
        if getattr(self.layers[layer_idx], "is_compileable", False) and not self.layers[layer_idx].is_sliding:
            return super().get_mask_sizes(query_length, layer_idx)  # type: ignore[misc]
        return self.get_seq_length() + query_length, 0
