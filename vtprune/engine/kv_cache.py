# SPDX-License-Identifier: Apache-2.0
"""Pruned KV caches: state that is kept between the calls of a generation, attached to the layers of its cache.

A pruned cache reports the length of the unpruned conversation to callers, `generate` and the model; only its layers
hold fewer tokens. The layers carry the state, so that it goes with them into a copy, a file or another cache object.
`CacheState` maps the slots of each layer to positions in the conversation, so that masks made for
the unpruned length can be cut down layer by layer. Since the reported length is that of the conversation, position ids
that a model derives from it are the original ones, and continued chats, cropping and hand-written loops work unchanged.

    cache.get_seq_length()        tokens of the conversation, including dropped ones
    cache.get_seq_length(layer)   tokens that the layer holds
"""

from __future__ import annotations

import functools
import weakref
from abc import ABC
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..core.transfer import to_device
from ..errors import VTPruneError
from ..models.transformers_names import PROMPT_LENGTH, is_cache
from .positions import Shift

if TYPE_CHECKING:
    from transformers import Cache

_STATE, _NUMBER = "_vtprune_state", "_vtprune_number"  # attributes of the layers of a pruned cache


class CacheState:
    """State of a pruned KV cache: the positions in the slots of its layers.

    Attributes:
        base: For each layer, the position `[B, P]` in each of its first `P` slots, -1 for slots that must not be
            attended to; None for a layer that was never cut. Slots from `P` on hold consecutive positions.
        length: Length of the conversation when `base` was written.
        shifts: For each layer, the shift of position ids, for methods that renumber.
        held: `[B, V, 2]` position and frame number of the visual tokens in the cache, -1 for none; with `window=` only.

    `may_hide=False` states that `base` has no -1, and saves the search for one.
    """

    def __init__(
        self, base: list[Tensor | None], length: int, shifts: Sequence[Shift | None] = (), may_hide: bool = True
    ) -> None:
        self.base = base
        self.length = length
        self.shifts = list(shifts)
        self.held: Tensor | None = None
        distinct = {id(b): b for b in base if b is not None}  # layers between two cuts share a tensor
        ragged = {name: may_hide and bool((b < 0).any()) for name, b in distinct.items()}
        self.ragged = [b is not None and ragged[id(b)] for b in base]
        self.open = False  # whether the last call had visual tokens, so that the next one must not add any
        self.reading: list[None] = []  # an entry for each call of a patched model that is using the cache
        self.mark: tuple[int, Tensor] | None = None  # a slot of the last layer, and its keys [B, G, d], see `mark_of`
        self._next: tuple[str, Any, weakref.ref[CacheState]] | None = None  # see `_once`

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_next": None, "reading": []}  # weak references cannot be pickled

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

    def selected(self, rows: Tensor) -> CacheState:
        """State of the selected rows of the batch."""
        return self._once("rows", rows, lambda: self._mapped(lambda x: x[to_device(rows, x.device)]))

    def repeated(self, repeats: int) -> CacheState:
        """State after every row of the batch was repeated."""
        return self._once("repeats", repeats, lambda: self._mapped(lambda x: x.repeat_interleave(repeats, 0)))

    def cropped(self, end: int) -> CacheState:
        """State after the positions from `end` on, which is inside the prompt, were removed.

        Raises:
            VTPruneError: Samples of the batch would keep different numbers of tokens.
        """
        return self._once("end", end, lambda: self._cropped(end))

    def _cropped(self, end: int) -> CacheState:
        base: list[Tensor | None] = []
        for slots in self.base:
            if slots is None:
                base.append(None)
                continue
            stays = (slots < end) & (slots >= 0)
            left = int(stays[0].sum())
            if not bool((stays == (torch.arange(stays.shape[1], device=stays.device) < left)).all()):
                raise VTPruneError(
                    "crop removes part of a pruned prompt from a batch whose samples keep different numbers of tokens; "
                    "crop only tokens after the prompt, or generate the samples one by one"
                )
            base.append(None if left == end else slots[:, :left])
        after = CacheState(base, end, self.shifts)
        if self.held is not None:
            after.held = self.held.masked_fill(self.held[..., :1] >= end, -1)
        return after

    def _mapped(self, function: Callable[[Tensor], Tensor]) -> CacheState:
        done: dict[int, Any] = {}  # layers that share a tensor keep sharing it
        base = [b if b is None else done.setdefault(id(b), function(b)) for b in self.base]
        shifts = [s if s is None else done.setdefault(id(s), s.map(function)) for s in self.shifts]
        after = CacheState(base, self.length, shifts)
        after.held = None if self.held is None else function(self.held)
        after.open = self.open
        return after

    def _once(self, kind: str, argument: Any, make: Callable[[], CacheState]) -> CacheState:
        """What `make` returns, made once for all layers that are changed in the same way one after another."""
        if self._next is not None and self._next[0] == kind:
            same = self._next[1] is argument or (isinstance(argument, int) and self._next[1] == argument)
            known = self._next[2]()
            if same and known is not None:
                return known
        made = make()
        self._next = (kind, argument, weakref.ref(made))
        return made


def state_of(cache: Any) -> CacheState | None:
    """The state of a cache with the layers of a pruned one; None for any other cache, and for one that was emptied.

    Raises:
        VTPruneError: Only some of the layers are those of a pruned cache, or they were cropped differently.
    """
    layers = getattr(cache, "layers", None)
    if not layers:
        if isinstance(cache, PrunedCache):  # emptied by hand
            detach(cache)
        return None
    first = _first(cache)
    state: CacheState | None = getattr(layers[first], _STATE, None)
    if state is None or _slots_filled(cache, first) == 0:
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
            if known.matches(keys):
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
        if not self._vtprune_state.reading and self._vtprune_state.is_pruned:
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
        if after.is_pruned or after.held is not None:
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
