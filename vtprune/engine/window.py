# SPDX-License-Identifier: Apache-2.0
"""Sliding window over the frames in a KV cache (`window=`), for streams.

After a prefill with pictures or clips, whole frames are removed from every layer, the oldest first, until no layer
holds more visual tokens of a sample than the window. Text stays. The remaining slots keep their positions, as after any
other cut, so later calls compute the same as the unpruned model with these frames masked.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.transfer import to_device
from ..errors import BudgetError, UnsupportedModelError
from ..models.visual_tokens import VisualTokens
from . import gather, kv_cache
from .cache_state import CacheState
from .call import CallState


def evict(call: CallState, window: int) -> list[Tensor]:
    """Removes the oldest frames from the cache after a prefill.

    Args:
        call: The call that has just ended; its cache holds the new tokens.
        window: Largest number of visual tokens of each sample in a layer.

    Returns:
        list: For each sample, the positions in the conversation of the removed tokens, ascending.

    Raises:
        BudgetError: The newest frame alone has more tokens than the window.
        UnsupportedModelError: The cache has layers from which tokens cannot be removed.
    """
    cache, visual = call.columns.cache, call.visual
    assert visual is not None
    if cache is None:
        return [torch.empty(0, dtype=torch.long)] * call.columns.batch
    _check(cache)
    state, before = kv_cache.state_of(cache), call.columns.state
    length = kv_cache.length(cache)
    state = state or CacheState([None] * len(cache.layers), length)
    held = _with_new(before.visual if before is not None else None, call, visual)
    stays = _newest(held, window)
    evicted = [row[~keep & (row[:, 0] >= 0)][:, 0] for row, keep in zip(held, stays, strict=True)]
    bases = list(state.base)
    if any(map(len, evicted)):
        dropped = torch.zeros(len(evicted), length, dtype=torch.bool)
        for row, positions in enumerate(evicted):
            dropped[row, positions] = True
        bases = _drop(cache, state, dropped)
    after = CacheState(bases, length, state.shifts)
    left = [row[keep] for row, keep in zip(held, stays, strict=True)]
    after.visual = torch.nn.utils.rnn.pad_sequence(left, batch_first=True, padding_value=-1)
    kv_cache.attach(cache, after)
    return evicted


def _check(cache: Any) -> None:
    """Refuses caches with layers other than `DynamicLayer`."""
    from transformers.cache_utils import DynamicLayer

    kinds = {kv_cache.plain_class(layer) for layer in cache.layers}
    other = sorted(kind.__name__ for kind in kinds if kind is not DynamicLayer)
    if other:
        raise UnsupportedModelError(
            f"window= removes tokens from the KV cache, which has layers of kind {', '.join(other)}; expected a "
            "DynamicCache of a decoder whose layers all have full attention"
        )


def _with_new(held: Tensor | None, call: CallState, visual: VisualTokens) -> Tensor:
    """Position and frame number `[B, V, 2]` of the visual tokens in the first layer, -1 for none.

    Frames count through the conversation of a sample. Tokens without a place (newlines) belong to the frame before.
    """
    kept = torch.ones(len(visual), dtype=torch.bool)
    if call.stages and call.stages[0] == 0:
        kept[:] = False
        kept[call.selections[0].kept] = True
    rows = []
    for row in range(call.columns.batch):
        own = (visual.sample == row).nonzero()[:, 0]
        before = held[row][held[row][:, 0] >= 0] if held is not None else torch.empty(0, 2, dtype=torch.long)
        placed = visual.grid_row[own] >= 0
        new = placed & ((visual.image[own].diff(prepend=visual.image[own][:1] - 1) != 0) | _changed(visual, own))
        number = new.cumsum(0) + (int(before[:, 1].max()) + 1 if len(before) else 0)
        entry = torch.stack([visual.position[own] + call.columns.past, number], 1)[kept[own]]
        rows.append(torch.cat([before, entry]))
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)


def _changed(visual: VisualTokens, own: Tensor) -> Tensor:
    """Mask `[m]` of tokens that are in another frame than the token with a place before them."""
    frame = visual.frame[own]
    placed = visual.grid_row[own] >= 0
    order = torch.where(placed, torch.arange(len(own)), -1)
    last = torch.cat([order.new_full((1,), -1), order.cummax(0).values[:-1]]) if len(own) else order
    return (last < 0) | (frame != frame[last.clamp_min(0)])


def _newest(held: Tensor, window: int) -> Tensor:
    """Mask `[B, V]` of the tokens of the newest frames that fit into the window together."""
    stays = torch.zeros(held.shape[:2], dtype=torch.bool)
    for row, entries in enumerate(held):
        numbers = entries[:, 1][entries[:, 0] >= 0]
        if not len(numbers):
            continue
        frames, sizes = numbers.unique(return_counts=True)
        if int(sizes[-1]) > window:
            raise BudgetError(
                f"the newest frame of sample {row} has {int(sizes[-1])} visual tokens, more than window={window}; use "
                "a larger window, or a smaller ratio"
            )
        fits = sizes.flip(0).cumsum(0).flip(0) <= window
        stays[row] = torch.isin(entries[:, 1], frames[fits]) & (entries[:, 0] >= 0)
    return stays


def _drop(cache: Any, state: CacheState, dropped: Tensor) -> list[Tensor | None]:
    """Removes the positions `dropped` `[B, length]` from every layer and returns the layers' new slots."""
    made: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # layers with the same cuts share their slots
    bases: list[Tensor | None] = []
    for number, layer in enumerate(cache.layers):
        count, old = kv_cache.cached_tokens(cache, number), state.base_of(number)
        if not count:
            bases.append(old)
            continue
        if (id(old), count) not in made:
            slots = state.slots(number, count)
            slots = torch.arange(count).expand(len(dropped), -1) if slots is None else slots.cpu()
            keep = (slots >= 0) & ~dropped.gather(1, slots.clamp_min(0))
            index, valid = gather.pack(keep, None)
            made[id(old), count] = index, torch.where(valid & keep.gather(1, index), slots.gather(1, index), -1)
        index, base = made[id(old), count]
        index = to_device(index, layer.keys.device)
        layer.keys, layer.values = (_slots_of(x, index) for x in (layer.keys, layer.values))
        bases.append(base)
    return bases


def _slots_of(x: Tensor, index: Tensor) -> Tensor:
    """Slots `[B, K]` of keys or values `[B, G, slots, d]`."""
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
