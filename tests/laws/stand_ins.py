# SPDX-License-Identifier: Apache-2.0
"""CPU replacements of flash attention and flex attention that take the same masks.

Flash attention gets no mask or a padding mask `[B, KV]`; flex attention gets a `BlockMask`. Here both are turned into
dense masks, so that every path of the engine can be tested on a CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    add_offsets_to_mask_function,
    and_masks,
    flash_attention_mask,
    padding_mask_function,
    prepare_padding_mask,
)


def flash(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> Any:
    """Causal attention aligned to the bottom right, over the keys that `attention_mask` `[B, KV]` leaves visible."""
    assert attention_mask is None or attention_mask.dim() == 2, "flash attention takes a padding mask [B, KV]"
    is_causal = kwargs.pop("is_causal", None)
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    queries, keys = query.shape[2], key.shape[2]
    allowed = torch.ones(query.shape[0], 1, queries, keys, dtype=torch.bool)
    if is_causal:
        allowed &= torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    if attention_mask is not None:
        allowed &= attention_mask.bool()[:, None, None, :keys]
    return sdpa_attention_forward(module, query, key, value, allowed, is_causal=False, **kwargs)


def flex(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
    """Attention under a `BlockMask`, by its dense equivalent."""
    kwargs.pop("is_causal", None)
    if attention_mask is None:
        return sdpa_attention_forward(module, query, key, value, None, is_causal=False, **kwargs)
    assert type(attention_mask).__name__ == "BlockMask"
    b, q, kv = torch.meshgrid(*map(torch.arange, (query.shape[0], query.shape[2], key.shape[2])), indexing="ij")
    allowed = attention_mask.mask_mod(b, torch.zeros_like(b), q, kv)[:, None]
    return sdpa_attention_forward(module, query, key, value, allowed, is_causal=False, **kwargs)


def flex_block_mask(batch_size: int, q_length: int, kv_length: int, mask_function: Any = None, **kwargs: Any) -> Any:
    """Flex attention's `BlockMask` as transformers builds it, without compilation."""
    from torch.nn.attention.flex_attention import create_block_mask

    q_offset, kv_offset = int(kwargs.get("q_offset", 0)), kwargs.get("kv_offset", 0)
    padding = kwargs.get("attention_mask")
    if padding is not None:
        known = padding_mask_function(prepare_padding_mask(padding, kv_length, kv_offset))
        mask_function = and_masks(mask_function, known)
    pattern = add_offsets_to_mask_function(mask_function, q_offset, kv_offset)
    return create_block_mask(pattern, batch_size, None, q_length, kv_length, device="cpu")


AttentionInterface.register("keys_stand_in", flash)
AttentionMaskInterface.register("keys_stand_in", flash_attention_mask)
AttentionInterface.register("flex_stand_in", flex)
AttentionMaskInterface.register("flex_stand_in", flex_block_mask)
