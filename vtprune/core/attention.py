# SPDX-License-Identifier: Apache-2.0
"""Attention that visual tokens receive from other tokens of the prompt."""

from __future__ import annotations

from torch import Tensor

from vtprune_kernels import attention_rows

from .tokens import AttentionInputs


def visual_attention(inputs: AttentionInputs, weights: Tensor | None = None) -> Tensor:
    """Attention that the visual tokens receive from the given queries, averaged over heads and queries.

    Args:
        inputs: Queries and keys of one layer.
        weights: `[R]` weights of the queries, by default equal.

    Returns:
        Tensor: `[M]` float32; the softmax runs over all keys that a query attends to.
    """
    received = attention_rows(
        inputs.queries,
        inputs.keys,
        inputs.query_offsets,
        inputs.key_offsets,
        inputs.query_order,
        inputs.scaling,
        inputs.softcap,
        weights=weights,
    )
    return received[inputs.visual]
