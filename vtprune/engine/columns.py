# SPDX-License-Identifier: Apache-2.0
"""The prompt positions that the layers of a decoder hold during one call, and the layers' arguments for them.

The decoder makes rotations, position ids and masks for all positions and passes the same ones to every layer. `Columns`
cuts them down to the positions that are left, layer by layer, and translates masks to the slots of a layer's cache.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.transfer import to_device
from ..errors import UnsupportedModelError
from ..models.arguments import map_tensors
from ..models.attended import is_block_mask
from ..models.transformers_names import PROMPT_LENGTH, WINDOW
from . import gather, kv_cache, masks, positions


@dataclass(frozen=True)
class AttentionForm:
    """The form of attention mask that the decoder takes, for masks that the engine makes itself.

    Attributes:
        name: Name of transformers' mask function for the attention implementation.
        dtype: Dtype of masks that are added to logits.
        device: Device of the masks.
        both_ways: Numbers of the layers where no mask stands for attention to all columns, not only to earlier ones.
    """

    name: str
    dtype: torch.dtype
    device: torch.device
    both_ways: frozenset[int] = frozenset()


class Columns:
    """The prompt positions that are left in one decoder call.

    Attributes:
        batch, length: Shape `[B, T]` of the call.
        past: Length of the conversation before it.
        real: `[B, T]` bool, False for padding; all True if not given.
        padded: Whether there may be padding.
        state: State of a cache that earlier calls pruned, or None.
        cache: The KV cache, known from the first layer on.
        index, valid: The current packed layout (see `gather`), `[B, K]` on the CPU.
        is_cut: Whether this call has dropped positions.
        layouts: The packed layout of every layer that ran.
        shift, shifts: Shift of position ids by the latest cut and by every layer, for methods that renumber.
        ragged: Whether samples keep different numbers of positions, so that layers see padding.
        inputs: States at all positions that some layers would have got, where gradients of them may be requested.

    Args:
        form: Makes the form of attention mask that the decoder takes, when a mask is needed.
        renumber: Whether kept tokens are numbered through, instead of keeping their positions.
        mixing: Whether layers mix neighboring columns (convolutions, linear attention), so that padding stays in place.
        uncut: Index and validity of the layout before any cut, where prompts of the same layout share them.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        real: Tensor | None,
        past: int,
        state: kv_cache.CacheState | None,
        cache: Any,
        form: Callable[[], AttentionForm],
        renumber: bool,
        mixing: bool,
        padded: bool = True,
        uncut: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.batch, self.length = shape
        self.past, self.state, self.cache, self._form = past, state, cache, form
        self.is_plain = state is None or state.is_plain
        if real is not None:
            self.real = real
        self.is_cut, self.ragged = False, False
        self._layouts: list[tuple[Tensor, Tensor] | None] = []  # of every layer that ran; None before the first cut
        self.shifts: list[positions.Shift | None] = []
        self.inputs: dict[int, Tensor] = {}
        self.renumber, self.mixing, self.padded = renumber, mixing, padded
        if uncut is not None:
            self._uncut = uncut
        self.shift: positions.Shift | None = None
        # Tensors made for the current packed layout, by ids of their sources; values reference the sources, so that
        # the ids stay unique.
        self._gathered: dict[Any, Any] = {}
        self._slots: dict[Any, tuple[Tensor, Tensor, bool]] = {}

    # Cached, because decoding steps, the most frequent calls, never need these.

    @functools.cached_property
    def real(self) -> Tensor:
        return torch.ones(self.batch, self.length, dtype=torch.bool)

    @functools.cached_property
    def attention_form(self) -> AttentionForm:
        return self._form()

    @functools.cached_property
    def _uncut(self) -> tuple[Tensor, Tensor]:
        return gather.all_positions(self.batch, self.length)

    @property
    def layouts(self) -> list[tuple[Tensor, Tensor]]:
        """The packed layout of every layer that ran."""
        return [self._uncut if layout is None else layout for layout in self._layouts]

    @property
    def slot_counts(self) -> list[int]:
        """Number of slots of every layer that ran."""
        return [self.length if layout is None else layout[0].shape[1] for layout in self._layouts]

    @functools.cached_property
    def index(self) -> Tensor:
        return self._uncut[0]

    @functools.cached_property
    def valid(self) -> Tensor:
        return self._uncut[1]

    @functools.cached_property
    def source(self) -> Tensor:
        """Prompt positions `[B, K]` that rotations and position ids are taken from; not `index` if renumbered."""
        return self.index

    @property
    def is_modified(self) -> bool:
        """Whether layers need other arguments than the decoder passes."""
        return self.is_cut or self.state is not None

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
        self.index, self.valid = gather.pack(stays, self.real if self.padded else None, self.mixing)
        self.is_cut, self.ragged = True, self.batch > 1 and not bool(self.valid.all())  # one row fills all slots
        if self.renumber:
            self.source = positions.sources(self.index, self.real)
            self.shift = positions.shift_of(rotation, self.real, self.index)
        else:
            self.source = self.index
        self._gathered.clear()
        self._slots.clear()
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

    def arguments(self, number: int, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Cuts the arguments of layer `number`, except hidden states, down from all positions to those left."""
        if self.needs_no_change(args, kwargs):
            return args, kwargs
        if self.is_cut:
            self._shorten_prompt(number)
        if self.state is None and len(args) < 2:
            return args, self._first_prompt_arguments(number, kwargs)
        if self.is_cut and "together" not in self._gathered:
            self._gather_together({**kwargs, **{str(place): value for place, value in enumerate(args[1:])}})
        new = {name: self._argument(number, name, value) for name, value in kwargs.items() if name != "hidden_states"}
        rest = tuple(self._argument(number, "", value) for value in args[1:])
        return (*args[:1], *rest), {**kwargs, **new}

    def needs_no_change(self, args: tuple, kwargs: dict[str, Any]) -> bool:
        """Whether arguments stay as they are: in decoding steps without a mask, the most frequent calls by far."""
        if self.is_cut or self.state is None or not self.is_plain:
            return False
        for name, value in kwargs.items():
            if value is not None and "mask" in name:
                return False
        return len(args) < 2 or not any(isinstance(value, Tensor) and value.dim() == 4 for value in args[1:])

    def _shorten_prompt(self, number: int) -> None:
        """Tells a cached layer whose window keeps the prompt how many of its tokens are left.

        Raises:
            UnsupportedModelError: An earlier call filled the layer: its window counts slots, not positions.
        """
        prompt = kv_cache.lasting_prompt(self.cache, number)
        if not prompt:
            return
        if self.past:
            raise UnsupportedModelError(
                f"layer {number} has a sliding window beside the first prompt, so that later turns cannot be cut; give "
                "all pictures in the first prompt, or run this turn inside patch.paused()"
            )
        setattr(self.cache.layers[number], PROMPT_LENGTH, min(prompt, self.index.shape[1]))

    def _first_prompt_arguments(self, number: int, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments of a layer of a first prompt; all but masks are the same for every layer that is given the same."""
        given = tuple(kwargs.values())
        key = ("layer", *map(id, given), *kwargs) if "hidden_states" not in kwargs else None
        known = None if key is None else self._gathered.get(key)
        if known is None:
            if "together" not in self._gathered:
                self._gather_together(kwargs)
            asked = {name: value for name, value in kwargs.items() if name != "hidden_states"}
            masks_ = {name: value for name, value in asked.items() if self._is_mask(name, value)}
            others = {n: self._argument(number, n, v) for n, v in asked.items() if n not in masks_}
            if not self.ragged:  # no mask stays none
                masks_ = {name: value for name, value in masks_.items() if value is not None}
            known = (given, masks_, {**kwargs, **others})
            if key is not None:
                self._gathered[key] = known
        _, masks_, ready = known
        return {**ready, **{name: self._mask(number, value) for name, value in masks_.items()}}

    def _argument(self, number: int, name: str, value: Any) -> Any:
        if self._is_mask(name, value):
            return self._mask(number, value)
        index = self._index_for(name)
        value = map_tensors(value, lambda x: self._cut(x, index)) if self.is_cut else value
        if name not in positions.NAMES:
            return value
        turned = self.state.shift(number) if self.state is not None else None
        return value if turned is None else turned.apply(name, value)

    def _index_for(self, name: str) -> Tensor:
        """Prompt positions `[B, K]` that an argument is gathered from."""
        return self.source if name in positions.NAMES else self.index

    def _is_mask(self, name: str, value: Any) -> bool:
        if "mask" in name or is_block_mask(value):
            return True
        square = (self.length, self.past + self.length)
        return isinstance(value, Tensor) and value.dim() == 4 and tuple(value.shape[2:]) == square

    def _gather_together(self, arguments: dict[str, Any]) -> None:
        """Gathers all arguments of a layer in as few kernel launches as possible; `_cut` uses the results."""
        self._gathered["together"] = True
        groups: dict[Any, dict[int, tuple[Tensor, int]]] = {}
        for name, value in arguments.items():
            if name == "hidden_states" or self._is_mask(name, value):
                continue
            index = self._index_for(name)
            tensors: list[Tensor] = []
            map_tensors(value, tensors.append)
            for x in tensors:
                dim = gather.column_dim(x, self.batch, self.length)
                if dim is not None and id(x) not in self._gathered:
                    groups.setdefault(self._on(index, x.device), {})[id(x)] = (x, dim)
        for index, group in groups.items():
            for (x, _), cut in zip(group.values(), gather.gather_all(list(group.values()), index), strict=True):
                self._gathered[id(x)] = (x, cut)

    def _cut(self, x: Tensor, index: Tensor) -> Tensor:
        """Gathers the kept positions of a tensor that has all positions; returns other tensors unchanged."""
        dim = gather.column_dim(x, self.batch, self.length)
        if dim is None:
            return x
        known = self._gathered.get(id(x))
        if known is None:
            known = self._gathered[id(x)] = (x, gather.gather(x, self._on(index, x.device), dim))
        return known[1]

    def _on(self, tensor: Tensor, device: torch.device) -> Tensor:
        """`tensor` on a device, copied once."""
        key = (id(tensor), device)
        if key not in self._gathered:
            self._gathered[key] = (tensor, to_device(tensor, device))
        return self._gathered[key][1]

    def _mask(self, number: int, mask: Any) -> Any:
        if mask is None and not self.ragged and not (self.state is not None and self.state.is_ragged(number)):
            return None
        slots, valid, plain = self.slots(number)
        if mask is None and plain:
            return None
        both_ways = mask is None and number in self.attention_form.both_ways
        key = ("mask", id(mask), id(slots), both_ways)
        if key not in self._gathered:
            made = self._translated(mask, slots, valid, both_ways)
            prompt = kv_cache.lasting_prompt(self.cache, number) if self.state is not None and self.length > 1 else 0
            if prompt and isinstance(made, Tensor) and made.dim() == 4:  # the model's own mask has no such window
                window = getattr(self.cache.layers[number], WINDOW)
                made = masks.windowed(made, self._on(self.index + self.past, made.device), slots, window, prompt)
            self._gathered[key] = (mask, slots, made)
        return self._gathered[key][2]

    def _translated(self, mask: Any, slots: Tensor, valid: Tensor, both_ways: bool) -> Any:
        if mask is None:
            on = self.attention_form.device
            columns = self.index.to(on) + self.past
            columns = torch.full_like(columns, self.past + self.length) if both_ways else columns
            return masks.causal_in_form(
                self.attention_form.name, columns, slots.to(on), valid.to(on), self.attention_form.dtype
            )
        if is_block_mask(mask):
            return masks.translate_block_mask(mask, self.index if self.is_cut else None, slots, valid)
        if mask.dim() == 2 and mask.shape[1] == self.length and (self.past or slots.shape[1] > self.index.shape[1]):
            slots, valid = self.index, self.valid  # a mask of this call's positions only
        rows = self._on(self.index, mask.device) if self.is_cut else None
        return masks.translate_mask(mask, rows, self._on(slots, mask.device), self._on(valid, mask.device))

    def slots(self, number: int) -> tuple[Tensor, Tensor, bool]:
        """Slots that layer `number` attends to: their positions `[B, k]`, which are valid `[B, k]`, and whether all
        filled ones are."""
        cached = kv_cache.cached_tokens(self.cache, number)
        queries = self.index.shape[1] if self.is_cut else self.length
        count, start = cached + queries, 0
        if self.cache is not None and number < len(self.cache.layers):
            sizes = getattr(self.cache.layers[number], "get_mask_sizes", None)
            count, start = map(int, sizes(queries)) if sizes is not None else (count, start)
        key = (id(self.state.base_of(number)) if self.state is not None else 0, cached, count, start)
        if key not in self._slots:
            filled = self._filled(number, cached, self.index, self.valid)
            filled = kv_cache.slots_attended(filled, kv_cache.lasting_prompt(self.cache, number), start, count)
            plain = not bool((filled < 0).any())
            # A static cache includes empty slots.
            filled = nn.functional.pad(filled, (0, count - filled.shape[1]), value=-1)
            self._slots[key] = filled.clamp(min=0), filled >= 0, plain
        return self._slots[key]

    def _filled(self, number: int, cached: int, index: Tensor, valid: Tensor) -> Tensor:
        """Positions `[B, cached + K]` in the slots of a layer, -1 for invalid ones, after the packed layout was added
        to the `cached` slots of earlier calls."""
        new = index + self.past if self.past else index
        new = torch.where(valid, new, -1) if self.batch > 1 else new
        if cached <= 0:
            return new
        before = self.state.slots(number, cached) if self.state is not None else None
        return torch.cat([torch.arange(cached).expand(self.batch, -1) if before is None else before, new], 1)

    def state_after(self) -> kv_cache.CacheState:
        """State of the cache after this call: slots and shifts of every layer."""
        made: dict[Any, Tensor | None] = {}
        bases: list[Tensor | None] = []
        for number, layout in enumerate(self._layouts):
            old = self.state.base_of(number) if self.state is not None else None
            if layout is None and old is None:
                bases.append(None)
                continue
            index, valid = self._uncut if layout is None else layout
            cached = kv_cache.cached_tokens(self.cache, number) - index.shape[1]
            key = (id(index), id(old), cached)
            if key not in made:
                whole = old is None and index.shape[1] == self.length and bool(valid.all())
                made[key] = None if whole else self._filled(number, cached, index, valid)
            bases.append(made[key])
        may_hide = self.batch > 1 or self.state is not None
        state = kv_cache.CacheState(bases, self.past + self.length, self.shifts, may_hide)
        state.mark = kv_cache.mark_of(self.cache)
        return state

    def restore(self, output: Any) -> Any:
        """Scatters a decoder's output to all positions of the call; dropped ones are zero.

        Hidden states become `[B, T, D]`, attention maps `[B, H, T, past + T]`, router logits `[B * T, E]`.
        """
        if isinstance(output, Tensor):
            return self._full(output, -1)
        if isinstance(output, tuple):
            return (self._full(output[0], -1), *map(self._restored_group, output[1:]))
        last = output.last_hidden_state
        output.last_hidden_state = self._full(last, -1)
        for name in ("hidden_states", "attentions", "router_logits"):
            group = getattr(output, name, None)
            if isinstance(group, (tuple, list)):
                full = self._restored_group(group)
                if name == "hidden_states" and group and group[-1] is last:
                    full = (*full[:-1], output.last_hidden_state)
                setattr(output, name, full)
        return output

    def _restored_group(self, group: Any) -> Any:
        """Restores hidden states (one more than layers), attention maps or router logits, recognized by their shape."""
        if not isinstance(group, (tuple, list)) or not any(isinstance(x, Tensor) for x in group):
            return group
        dims = next(x.dim() for x in group if isinstance(x, Tensor))
        if dims == 3 or len(group) == len(self.layouts) + 1:  # hyper-connections have several streams, [B, T, S, D]
            # Entry 0 is the input of the first layer, entry i the output of layer i - 1.
            full = (None if h is None else self._full(h, max(i - 1, 0)) for i, h in enumerate(group))
            return tuple(self.inputs.get(i, h) for i, h in enumerate(full))
        layers = self._layers_of(group, dims)
        function = self._full_attention if dims == 4 else self._full_rows
        return tuple(x if x is None else function(x, layer) for x, layer in zip(group, layers, strict=True))

    def _layers_of(self, group: Any, dims: int) -> list[int]:
        """The layer of each entry; decoders with several kinds of layers return entries for some layers only."""
        if len(group) == len(self.layouts):
            return list(range(len(group)))
        layers: list[int] = []
        for x in group:
            start = layers[-1] + 1 if layers else 0
            queries = (x.shape[2] if dims == 4 else x.shape[0] // self.batch) if isinstance(x, Tensor) else None
            fitting = (i for i in range(start, len(self.layouts)) if self.layouts[i][0].shape[1] == queries)
            layers.append(next(fitting, start))
        if layers and layers[-1] >= len(self.layouts):
            raise UnsupportedModelError(
                f"the decoder returned {len(group)} attention maps or router logits for {len(self.layouts)} layers, "
                "and it is unknown which layers they belong to; request them inside patch.paused()"
            )
        return layers

    def _full(self, x: Tensor, layer: int) -> Tensor:
        if not self.is_cut:
            return x
        index, valid = self.layouts[layer]
        if x.dim() < 3 or x.shape[1] != index.shape[1]:
            return x
        whole = bool(valid.all()) if layer >= 0 else not self.ragged
        if whole and index.shape[1] == self.length:
            return x
        places = None if whole else to_device(valid, x.device)
        return gather.scatter(x, to_device(index, x.device), places, self.length)

    def _full_rows(self, x: Tensor, layer: int) -> Tensor:
        """Scatters router logits `[B * K, E]` to `[B * T, E]`."""
        return self._full(x.unflatten(0, (self.batch, -1)), layer).flatten(0, 1)

    def _full_attention(self, x: Tensor, layer: int) -> Tensor:
        """Scatters an attention map `[B, H, q, k]` to `[B, H, T, past + T]`."""
        index, valid = self.layouts[layer]
        held = kv_cache.cached_tokens(self.cache, layer)
        slots = self._filled(layer, held - index.shape[1], index, valid)  # -1 for slots that must not be attended to
        keys_seen = x.shape[-1]
        # A sliding window attends to the last slots only; a static cache includes empty slots.
        empty = max(keys_seen - slots.shape[1], 0)
        slots = nn.functional.pad(slots, (0, empty), value=-1)
        prompt = kv_cache.lasting_prompt(self.cache, layer)
        slots = kv_cache.slots_attended(slots, prompt, slots.shape[1] - keys_seen, keys_seen)
        total = self.past + self.length
        keys = x.movedim(3, 1)  # [B, k, H, q]
        keys = gather.scatter(keys, to_device(slots.clamp(min=0), x.device), to_device(slots >= 0, x.device), total)
        return self._full(keys.movedim(1, 3).transpose(1, 2), layer).transpose(1, 2)

    def through_full_length(self, number: int, hidden: Tensor) -> Tensor:
        """Scatters hidden states `[B, K, D]` to all positions and gathers them again, so that the full-length input of
        layer `number`, which the caller gets, is part of the autograd graph."""
        on = hidden.device
        full = gather.scatter(hidden, to_device(self.index, on), to_device(self.valid, on), self.length)
        self.inputs[number] = full
        return gather.gather(full, to_device(self.index, on), 1)


def slot_of_position(index: Tensor, valid: Tensor, length: int) -> Tensor:
    """Inverts a packed layout: slot `[B, length]` of each position, -1 for dropped positions."""
    slot = torch.full((index.shape[0], length + 1), -1)
    slot.scatter_(1, torch.where(valid, index, length), torch.arange(index.shape[1]).expand_as(index))
    return slot[:, :length]
