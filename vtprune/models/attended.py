# SPDX-License-Identifier: Apache-2.0
"""What the queries of a prepared attention mask may attend to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_HIDES = -5000.0  # values of a float mask below it hide a position: besides the lowest, -10000 is common


def is_block_mask(value: Any) -> bool:
    """Whether `value` is a flex-attention mask, without importing its class."""
    return type(value).__name__ == "BlockMask"


def attended(mask: Any, batch: int, length: int, queries: Tensor | None = None) -> Tensor | None:
    """The positions that queries attend to in the first head.

    Args:
        mask: `[B or 1, heads, Q, KV]` bool or float, a `BlockMask`, or a dict of masks by kind of layer.
        batch, length: Rows `B` and queries `Q` of the call.
        queries: `[B]` one query of every row, or None for all.

    Returns:
        Tensor: `[B, q, KV]` bool; None for a mask of another form or length.
    """
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if is_block_mask(mask) and mask.seq_lengths[0] == length:
        device, (count, total) = mask.kv_num_blocks.device, mask.seq_lengths
        rows = torch.arange(batch, device=device)[:, None, None]
        places = torch.arange(count, device=device)[None] if queries is None else queries.to(device)[:, None]
        seen = mask.mask_mod(rows, torch.zeros_like(rows), places[..., None], torch.arange(total, device=device))
        return seen.expand(batch, places.shape[1], total)
    if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.shape[2] != length:
        return None
    first = mask[:, 0].expand(batch, -1, -1)
    first = first if queries is None else first[torch.arange(batch), queries.to(mask.device)][:, None]
    return first if first.dtype == torch.bool else first > _HIDES


def attended_columns(seen: Tensor, past: int) -> Tensor:
    """The columns that some query attends to, beside queries of padding.

    So that softmax stays finite, padding may attend to itself and to nothing else, or to every column.

    Args:
        seen: `[B, Q, KV]` bool, see `attended`.
        past: Column of the first query.

    Returns:
        Tensor: `[B, KV]` bool.
    """
    everywhere = seen.all(2)
    everywhere[:, -1:] &= everywhere[:, :-1].any(1, keepdim=True)  # the last token sees every one before it
    everywhere &= ~everywhere.all(1, keepdim=True)  # attention in both directions
    seen = seen & ~everywhere[:, :, None]
    itself = torch.zeros_like(seen[0])
    itself.diagonal(past).fill_(True)
    others = seen & ~itself
    alone = ~(others.any(2) | others.any(1)[:, past : past + others.shape[1]])
    alone &= ~alone.all(1, keepdim=True)  # a row of one token
    columns = seen.any(1)
    columns[:, past : past + others.shape[1]] &= ~alone
    return columns
