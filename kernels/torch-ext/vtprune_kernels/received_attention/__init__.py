# SPDX-License-Identifier: Apache-2.0
"""Attention that each token of a vision layer receives, without the N x N attention map."""

from __future__ import annotations

from torch import Tensor

from .._dispatch import on_gpu, triton_source
from .vectorized import received_attention as _vectorized


def received_attention(
    queries: Tensor, keys: Tensor, scaling: float, rows: Tensor | None = None, offsets: Tensor | None = None
) -> Tensor:
    """Column means of the softmax attention of a whole bidirectional layer, over heads and query rows.

    Queries and keys in half precision are multiplied as they are on a GPU, and summed in float32: the products are
    exact, so the choice is that of float32. The softmax is float32 everywhere; so is all on a CPU.

    Args:
        queries: `[B, H, N, dh]`.
        keys: `[B, G, N, dh]`, `G` dividing `H`.
        scaling: Factor on the dot product.
        rows: Bool `[N]` or `[B, N]`: only these query rows are averaged, such as that of the class token.
        offsets: `[S + 1]` offsets along `N`: tokens attend within their own segment only (packed images).

    Returns:
        Tensor: `[B, N]` float32; it sums to 1 per sample and segment, or to 0 if no row is averaged.
    """
    run = triton_source("received_attention") if on_gpu(keys) else _vectorized
    return run(queries, keys, scaling, rows, offsets)


__all__ = ["received_attention"]
