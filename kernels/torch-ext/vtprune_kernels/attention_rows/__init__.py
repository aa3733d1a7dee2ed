# SPDX-License-Identifier: Apache-2.0
"""Attention of a few query rows over all their keys, without the attention map of the layer."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from .._dispatch import on_gpu, triton_source
from .vectorized import attention_rows as _vectorized


def attention_rows(
    queries: Tensor,
    keys: Tensor,
    query_offsets: Tensor,
    key_offsets: Tensor,
    query_order: Tensor,
    scaling: float,
    softcap: float | None = None,
    reduce: Literal["mean", "none"] = "mean",
    weights: Tensor | None = None,
    max_length: int | None = None,
) -> Tensor:
    """Causal softmax attention in float32 of the given rows over all keys of their sample.

    Args:
        queries: `[R, H, dh]`, rows of all samples.
        keys: `[C, G, dh]`, keys of all samples, not repeated for grouped heads.
        query_offsets: `[S + 1]` offsets of the samples' rows.
        key_offsets: `[S + 1]` offsets of the samples' keys.
        query_order: `[R]` index of each row among its sample's keys: it attends to keys `0..query_order`.
        scaling: Factor on the dot product.
        softcap: Tanh cap on the logits.
        reduce: `"mean"` over heads and rows of the sample, or `"none"`.
        weights: `[R]` weights of the rows in the mean over rows (a 0/1 mask selects rows), normalized to sum 1 per
            sample. Used by `"mean"` only.
        max_length: `L` below, or more; by default it is read from `key_offsets`, which synchronizes with their device.

    Returns:
        Tensor: float32. `"mean"`: `[C]`, zero for samples without rows; `"none"`: `[H, R, L]`, where `L` is the largest
        number of keys of a sample and column `j` the sample's key `j`, zero beyond its keys.
    """
    if reduce not in ("mean", "none"):
        raise ValueError(f"reduce is {reduce!r}; expected 'mean' or 'none'")
    run = triton_source("attention_rows") if on_gpu(keys) else _vectorized
    settings = (scaling, softcap, reduce, weights, max_length)
    return run(queries, keys, query_offsets, key_offsets, query_order, *settings)


__all__ = ["attention_rows"]
