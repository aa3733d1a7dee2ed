# SPDX-License-Identifier: Apache-2.0
"""Query-conditioned magnitude of each key-value pair's rank-one weight update (IWP, arXiv 2604.00757, section 3)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from .._dispatch import on_gpu, triton_source
from .vectorized import rank1_relevance as _vectorized


def rank1_relevance(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    query_offsets: Tensor,
    key_offsets: Tensor,
    query_order: Tensor,
    visual: Tensor,
    scaling: float,
    reduce: Literal["mean", "rms", "max"] = "mean",
    normalize: Literal["visible", "visual"] = "visible",
    softcap: float | None = None,
) -> Tensor:
    """Logarithm of `M_i = reduce_{h,t} exp(a_hti - Z_ht) |v_i|` for the visual keys, computed in the log domain.

    `a` are the attention logits of head `h` and query row `t`. The normalizer `Z` is their log-sum-exp over the keys
    visible to the row; without it, one head would outweigh all others. Query head `h` reads KV head `h // (H / G)`.

    Args:
        queries: `[R, H, dh]`, rows of all samples.
        keys: `[C, G, dh]`, keys of all samples, not repeated for grouped heads.
        values: `[C, G, dv]`.
        query_offsets: `[S + 1]` offsets of the samples' rows.
        key_offsets: `[S + 1]` offsets of the samples' keys.
        query_order: `[R]` index of each row among its sample's keys: it attends to keys `0..query_order`.
        visual: `[M]` rows of `keys` to score, ascending.
        scaling: Factor on the dot product.
        reduce: Reduction over heads and query rows: mean, root mean square or maximum of the magnitudes.
        normalize: `Z` over all visible keys, or over the visible visual keys only.
        softcap: Tanh cap on the logits.

    Returns:
        Tensor: `[M]` float32, natural logarithm; minus infinity if no query row attends to the key.
    """
    if reduce not in ("mean", "rms", "max") or normalize not in ("visible", "visual"):
        raise ValueError(f"reduce={reduce!r}, normalize={normalize!r}; expected mean|rms|max and visible|visual")
    run = triton_source("rank1_relevance") if on_gpu(keys) else _vectorized
    return run(
        queries, keys, values, query_offsets, key_offsets, query_order, visual, scaling, reduce, normalize, softcap
    )


__all__ = ["rank1_relevance"]
