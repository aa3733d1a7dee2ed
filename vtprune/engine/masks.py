# SPDX-License-Identifier: Apache-2.0
"""Attention masks over the positions that a layer holds, cut out of masks over all positions of the prompt.

A model makes its masks for the unpruned conversation: a 4-D tensor of bools or of floats that are added to logits, a
2-D padding mask, a flex-attention `BlockMask`, or None for plain causal attention. Here each is cut down to the queries
and KV slots that are left.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.transfer import to_device
from .gather import gather


@dataclass(frozen=True)
class AttentionForm:
    """The form of attention mask that the decoder takes, for masks that the engine makes itself.

    Attributes:
        name: Name of transformers' mask function for the attention implementation: flash attention takes the mask of
            valid slots, eager a float mask.
        dtype: Dtype of masks that are added to logits.
        device: Device of the masks.
        both_ways: Numbers of the layers where no mask stands for attention to all columns, not only to earlier ones.
    """

    name: str
    dtype: torch.dtype
    device: torch.device
    both_ways: frozenset[int] = frozenset()


def translate_mask(mask: Tensor, rows: Tensor | None, slots: Tensor, valid: Tensor) -> Tensor:
    """Turns an attention mask over all prompt positions into one over the positions that a layer holds.

    Args:
        mask: `[B or 1, heads or 1, Q, KV]` bool (True attends) or float (added to logits), or `[B, KV]` (non-zero
            attends). `Q` and `KV` count positions of the unpruned prompt.
        rows: `[B, q]` positions of the queries, or None for all.
        slots: `[B, k]` position in each KV slot of the layer.
        valid: `[B, k]` False for slots that must not be attended to.

    Returns:
        Tensor: The same kind of mask, `[B, heads, q, k]` or `[B, k]`.
    """
    slots = slots.clamp(0, mask.shape[-1] - 1)
    if mask.dim() == 2:
        return gather(mask, slots, 1) * valid.to(mask.dtype)
    if rows is not None:
        mask = gather(mask.transpose(1, 2), rows, 1).transpose(1, 2)  # [B or 1, h, q, KV]
    mask = gather(mask.movedim(3, 1), slots, 1).movedim(1, 3).contiguous()  # [B, h, q, k]
    return _without(mask, ~valid[:, None, None, :])


def causal_mask(columns: Tensor, slots: Tensor, valid: Tensor) -> Tensor:
    """Builds the causal mask that None stands for: a query attends to valid slots up to its own position.

    Args:
        columns: `[B, q]` positions of the queries.
        slots, valid: `[B, k]`.

    Returns:
        Tensor: `[B, 1, q, k]` bool.
    """
    return ((slots[:, None, :] <= columns[:, :, None]) & valid[:, None, :])[:, None]


def windowed(mask: Tensor, columns: Tensor, slots: Tensor, window: int, prompt: int) -> Tensor:
    """Blocks what a sliding window beside the prompt leaves behind.

    Args:
        mask: `[B or 1, heads or 1, q, k]` bool or float.
        columns: `[B, q]` positions of the queries.
        slots: `[B, k]` position in each KV slot of the layer.
        window: Size of the window in positions.
        prompt: Number of first slots that stay in view.
    """
    far = columns[:, :, None] - to_device(slots, columns.device)[:, None, :] >= window
    far[..., :prompt] = False
    return _without(mask, far[:, None])


def _without(mask: Tensor, blocked: Tensor) -> Tensor:
    """A bool or float mask that blocks the given places, too."""
    return mask & ~blocked if mask.dtype == torch.bool else mask.masked_fill(blocked, torch.finfo(mask.dtype).min)


def causal_in_form(form: AttentionForm, columns: Tensor, slots: Tensor, valid: Tensor) -> Any:
    """Builds `causal_mask` in the form that an attention implementation takes."""
    columns, slots, valid = (x.to(form.device) for x in (columns, slots, valid))
    if "flash" in form.name:
        return valid
    mask = causal_mask(columns, slots, valid)
    if "eager" in form.name:
        zeros = torch.zeros(mask.shape, dtype=form.dtype, device=mask.device)
        return zeros.masked_fill(~mask, torch.finfo(form.dtype).min)
    if "flex" in form.name:
        from torch.nn.attention.flex_attention import create_block_mask

        def pattern(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            return mask[b, 0, q, kv]

        return create_block_mask(pattern, mask.shape[0], None, mask.shape[2], mask.shape[3], device=str(mask.device))
    return mask


def translate_block_mask(mask: Any, rows: Tensor | None, slots: Tensor, valid: Tensor) -> Any:
    """`translate_mask` for flex attention: the mask function is evaluated at the positions of rows and slots.

    Args:
        mask: `BlockMask` over all positions.
        rows: `[B, q]` positions of the queries, or None for all.
        slots, valid: `[B, k]`.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    device = mask.kv_num_blocks.device
    slots, valid = to_device(slots, device), to_device(valid, device)
    rows = torch.arange(mask.seq_lengths[0]).expand(slots.shape[0], -1) if rows is None else rows
    rows, pattern = to_device(rows, device), mask.mask_mod

    def translated(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return pattern(b, h, rows[b, q], slots[b, kv]) & valid[b, kv]

    return create_block_mask(translated, slots.shape[0], None, rows.shape[1], slots.shape[1], device=str(device))
