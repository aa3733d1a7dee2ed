# SPDX-License-Identifier: Apache-2.0
"""Streams: a bound on the visual tokens that a KV cache holds, kept by letting the oldest frames go.

After a prefill that brought pictures or clips, whole frames leave every layer, the oldest first, until no layer holds
more visual tokens of a sample than the window. Text stays. The slots that are left keep their columns and positions, as
after any other cut, so later calls compute what a masked model would that cannot see those frames.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.transfer import to_device
from ..errors import BudgetError, UnsupportedModelError
from ..models.visual_tokens import VisualTokens
from . import gather, kv_cache
from .call import CallState
from .kv_cache import CacheState


def evict(call: CallState, window: int) -> list[Tensor]:
    """Lets the oldest frames go after a prefill.

    Args:
        call: The call that has just ended; its cache holds the new columns.
        window: Visual tokens of each sample that a layer may hold.

    Returns:
        list: For each sample the columns of the conversation that left the cache, ascending.

    Raises:
        BudgetError: The newest frame alone has more tokens than the window.
        UnsupportedModelError: The cache has layers whose columns cannot be taken out.
    """
    cache, visual = call.columns.cache, call.visual
    assert visual is not None
    if cache is None:
        return [torch.empty(0, dtype=torch.long)] * call.columns.batch
    _check(cache)
    state = kv_cache.state_of(cache) or CacheState([None] * len(cache.layers), kv_cache.length(cache))
    before = call.columns.state
    held = _with_new(before.held if before is not None else None, call, visual)
    stays = _newest(held, window)
    gone = [row[~keep & (row[:, 0] >= 0)][:, 0] for row, keep in zip(held, stays, strict=True)]
    after = CacheState(list(state.base), kv_cache.length(cache), state.shifts)
    if any(map(len, gone)):
        dropped = torch.zeros(len(gone), after.length, dtype=torch.bool)
        for row, columns in enumerate(gone):
            dropped[row, columns] = True
        after.base = _drop(cache, state, dropped)
        after.ragged = [bool((base < 0).any()) if base is not None else False for base in after.base]
    after.held = _packed(held, stays)
    kv_cache.attach(cache, after)
    return gone


def _check(cache: Any) -> None:
    """Refuses caches that do not simply hold keys and values of all columns."""
    from transformers.cache_utils import DynamicLayer

    other = sorted({type(layer).__name__ for layer in cache.layers if type(layer) is not DynamicLayer})
    if other:
        raise UnsupportedModelError(
            f"window= takes columns out of the KV cache, and this one has layers of kind {', '.join(other)}, which "
            "forget by themselves, cannot forget, or keep their tensors elsewhere; expected a DynamicCache of a "
            "decoder whose layers all attend to everything"
        )


def _with_new(held: Tensor | None, call: CallState, visual: VisualTokens) -> Tensor:
    """`[B, V, 2]` column and frame number of the visual tokens that the first layer holds, -1 for none.

    Frames count through the conversation of a sample. Tokens without a place (newlines) go with the frame before.
    """
    kept = torch.ones(len(visual), dtype=torch.bool)
    if call.stages and call.stages[0][0] == 0:
        kept[:] = False
        kept[call.decisions[0].kept] = True
    rows = []
    for row in range(call.columns.batch):
        mine = (visual.sample == row).nonzero()[:, 0]
        before = held[row][held[row][:, 0] >= 0] if held is not None else torch.empty(0, 2, dtype=torch.long)
        placed = visual.grid_row[mine] >= 0
        new = placed & ((visual.image[mine].diff(prepend=visual.image[mine][:1] - 1) != 0) | _changed(visual, mine))
        number = new.cumsum(0) + (int(before[:, 1].max()) + 1 if len(before) else 0)
        entry = torch.stack([visual.position[mine] + call.columns.past, number], 1)[kept[mine]]
        rows.append(torch.cat([before, entry]))
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)


def _changed(visual: VisualTokens, mine: Tensor) -> Tensor:
    """`[m]` bool: whether a token is in another frame than the last token with a place before it."""
    frame = visual.frame[mine]
    placed = visual.grid_row[mine] >= 0
    order = torch.where(placed, torch.arange(len(mine)), -1)
    last = torch.cat([order.new_full((1,), -1), order.cummax(0).values[:-1]]) if len(mine) else order
    return (last < 0) | (frame != frame[last.clamp_min(0)])


def _newest(held: Tensor, window: int) -> Tensor:
    """`[B, V]` bool: the tokens of the newest frames that fit into the window together."""
    stays = torch.zeros(held.shape[:2], dtype=torch.bool)
    for row, entries in enumerate(held):
        numbers = entries[:, 1][entries[:, 0] >= 0]
        if not len(numbers):
            continue
        frames, sizes = numbers.unique(return_counts=True)
        if int(sizes[-1]) > window:
            raise BudgetError(
                f"the newest frame of sample {row} has {int(sizes[-1])} visual tokens, and window={window} holds "
                "fewer; use a larger window, or a smaller ratio"
            )
        fits = sizes.flip(0).cumsum(0).flip(0) <= window
        stays[row] = torch.isin(entries[:, 1], frames[fits]) & (entries[:, 0] >= 0)
    return stays


def _packed(held: Tensor, stays: Tensor) -> Tensor:
    """`[B, V', 2]` the entries that stay."""
    rows = [row[keep] for row, keep in zip(held, stays, strict=True)]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)


def _drop(cache: Any, state: CacheState, dropped: Tensor) -> list[Tensor | None]:
    """Takes columns `[B, length]` out of every layer and returns the layers' new slots."""
    made: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # layers cut alike share their slots
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
            index, valid = gather.pack(keep, torch.ones_like(keep))
            made[id(old), count] = index, torch.where(valid & keep.gather(1, index), slots.gather(1, index), -1)
        index, base = made[id(old), count]
        index = to_device(index, layer.keys.device)
        layer.keys, layer.values = (_slots_of(x, index) for x in (layer.keys, layer.values))
        bases.append(base)
    return bases


def _slots_of(x: Tensor, index: Tensor) -> Tensor:
    """Slots `[B, K]` of keys or values `[B, G, slots, d]`."""
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
