# SPDX-License-Identifier: Apache-2.0
"""State of a pruned KV cache, kept between the calls of a conversation: which position each slot of a layer holds.

With it, masks that a model makes for the unpruned length are cut down layer by layer.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core.transfer import to_device
from ..errors import VTPruneError
from .positions import Shift

if TYPE_CHECKING:
    from transformers import Cache


@dataclass(frozen=True)
class CacheMark:
    """The keys in the last slot of a cache's last layer, which depend on all tokens and so identify the cache.

    Attributes:
        slot: Number of the slot.
        keys: `[B, G, d]`.
    """

    slot: int
    keys: Tensor

    @classmethod
    def of(cls, cache: Cache) -> CacheMark | None:
        """The mark of a cache; None if its last layer has no such keys, or a sliding window will drop them."""
        layer = next((x for x in reversed(cache.layers) if hasattr(x, "get_seq_length")), None)
        keys = getattr(layer, "keys", None)
        if layer is None or not isinstance(keys, Tensor) or keys.dim() != 4 or getattr(layer, "is_sliding", True):
            return None
        slot = int(layer.get_seq_length()) - 1
        return cls(slot, keys[:, :, slot].detach().clone()) if 0 <= slot < keys.shape[2] else None

    def is_in(self, keys: Tensor) -> bool:
        """Whether `keys` `[B, G, slots, d]` of a last layer have the same in this slot, up to a cast."""
        if keys.dim() != 4 or keys.shape[2] <= self.slot:
            return False
        known, found = self.keys, keys[:, :, self.slot]
        casts = dict.fromkeys((known.dtype, torch.bfloat16, torch.float16))
        return known.shape == found.shape and any(
            torch.equal(known.to(dtype).to(known), found.to(known)) for dtype in casts
        )


class CacheState:
    """State of a pruned KV cache: the positions in the slots of its layers.

    Attributes:
        base: For each layer, the position `[B, P]` in each of its first `P` slots, -1 for slots that must not be
            attended to; None for a layer that was never cut. Slots from `P` on hold consecutive positions.
        length: Length of the conversation when `base` was written.
        shifts: For each layer, the shift of position ids, for methods that renumber.
        ragged: For each layer, whether some slots must not be attended to.
        visual: With `window=`, `[B, V, 2]` position and frame number of the visual tokens in the cache, -1 for none.
        ends_in_visual: Whether the last call had visual tokens, so that the next one must not add any.
        calls: An entry for each call of a patched model that is using the cache.
        mark: Identifies the cache's tensors in another cache.

    Args:
        may_hide: False states that `base` has no -1, and saves the search for one.
    """

    def __init__(
        self, base: list[Tensor | None], length: int, shifts: Sequence[Shift | None] = (), may_hide: bool = True
    ) -> None:
        self.base = base
        self.length = length
        self.shifts = list(shifts)
        self.visual: Tensor | None = None
        distinct = {id(b): b for b in base if b is not None}  # layers between two cuts share a tensor
        ragged = {name: may_hide and bool((b < 0).any()) for name, b in distinct.items()}
        self.ragged = [b is not None and ragged[id(b)] for b in base]
        self.ends_in_visual = False
        self.calls: list[None] = []
        self.mark: CacheMark | None = None
        self._next: tuple[str, Any, weakref.ref[CacheState]] | None = None  # see `_once`

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_next": None, "calls": []}  # weak references cannot be pickled

    def copy(self) -> CacheState:
        """Copy that can be changed independently."""
        again = CacheState(list(self.base), self.length, self.shifts)
        again.visual = self.visual
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
        if self.visual is not None:
            after.visual = self.visual.masked_fill(self.visual[..., :1] >= end, -1)
        return after

    def _mapped(self, function: Callable[[Tensor], Tensor]) -> CacheState:
        done: dict[int, Any] = {}  # layers that share a tensor keep sharing it
        base = [b if b is None else done.setdefault(id(b), function(b)) for b in self.base]
        shifts = [s if s is None else done.setdefault(id(s), s.map(function)) for s in self.shifts]
        after = CacheState(base, self.length, shifts)
        after.visual = None if self.visual is None else function(self.visual)
        after.ends_in_visual = self.ends_in_visual
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
