# SPDX-License-Identifier: Apache-2.0
"""Attention on a GPU, reduced over queries or keys without the full map, or written out.

Query rows of one KV head are ordered as (row, head) pairs, so that its query heads share a tile.
Products of half-precision inputs are exact in float32; float32 inputs are multiplied in full precision, never in TF32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._ragged import on
from ._triton import WIDEN, blocks, power_of_two

NEVER = -float("inf")


class Rows(NamedTuple):
    """Query rows and keys of a ragged batch, as `attention_rows` describes them."""

    queries: Tensor
    keys: Tensor
    query_offsets: Tensor
    key_offsets: Tensor
    order: Tensor
    scaling: float
    softcap: float

    @property
    def strides(self) -> tuple[int, ...]:
        return (*self.queries.stride(), *self.keys.stride())

    @property
    def tile(self) -> dict[str, int | bool]:
        size = power_of_two(self.keys.shape[-1])
        per_group = self.queries.shape[1] // self.keys.shape[1]
        large = size * self.keys.element_size() > 256
        shape = {"GROUP_SIZE": per_group, "HEAD_DIM": self.keys.shape[-1], "BLOCK_D": size}
        blocks = {"BLOCK_M": 16 if large else 32, "BLOCK_N": 16 if large else 64}
        return {**shape, **blocks, "HAS_SOFTCAP": self.softcap > 0, "num_stages": 1 if large else 2}


def rows_of(
    queries: Tensor,
    keys: Tensor,
    query_offsets: Tensor,
    key_offsets: Tensor,
    order: Tensor,
    scaling: float,
    softcap: float | None,
) -> Rows:
    """Moves offsets to the device of the keys, and casts queries and keys to a common dtype."""
    dtype = torch.promote_types(queries.dtype, keys.dtype)
    device = keys.device
    starts, key_starts = on(query_offsets, device), on(key_offsets, device)
    return Rows(queries.to(dtype), keys.to(dtype), starts, key_starts, on(order, device), scaling, softcap or 0.0)


@triton.jit
def _logits(
    q_ptr, k_ptr, order_ptr, pairs, pair_mask, cols, col_mask, key_start, kv_head, scaling, softcap, stride_qm,
    stride_qh, stride_qd, stride_kn, stride_kh, stride_kd,
    GROUP_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Logits `[BLOCK_M, BLOCK_N]` of (row, head) pairs and keys; minus infinity for masked keys."""
    offs_d = tl.arange(0, BLOCK_D)
    rows = pairs // GROUP_SIZE
    head = kv_head * GROUP_SIZE + pairs % GROUP_SIZE
    offs = rows.to(tl.int64) * stride_qm + head * stride_qh
    mask = pair_mask[:, None] & (offs_d < HEAD_DIM)[None, :]
    q = tl.load(q_ptr + offs[:, None] + offs_d[None, :] * stride_qd, mask=mask, other=0.0)
    offs = cols.to(tl.int64) * stride_kn + kv_head * stride_kh
    mask = col_mask[None, :] & (offs_d < HEAD_DIM)[:, None]
    k = tl.load(k_ptr + offs[None, :] + offs_d[:, None] * stride_kd, mask=mask, other=0.0)
    if WIDEN:
        q, k = q.to(tl.float32), k.to(tl.float32)
    logits = tl.dot(q, k, input_precision="ieee") * scaling
    if HAS_SOFTCAP:
        decay = tl.exp(-2 * tl.abs(logits) / softcap)
        logits = tl.where(logits < 0, -softcap, softcap) * (1 - decay) / (1 + decay)
    last_key = tl.load(order_ptr + rows, mask=pair_mask, other=-1)
    visible = pair_mask[:, None] & col_mask[None, :] & ((cols - key_start)[None, :] <= last_key[:, None])
    return tl.where(visible, logits, -float("inf"))


@triton.jit
def _normalize(
    q_ptr, k_ptr, order_ptr, block_sample_ptr, block_start_ptr, query_offsets_ptr, key_offsets_ptr, chosen_ptr, lse_ptr,
    n_samples, n_heads, scaling, softcap, stride_qm, stride_qh, stride_qd, stride_kn, stride_kh, stride_kd,
    HAS_CHOSEN: tl.constexpr, GROUP_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of every (row, head) pair over its visible keys, or over those marked in `chosen_ptr`."""
    sample, kv_head = tl.load(block_sample_ptr + tl.program_id(0)), tl.program_id(1)
    if sample >= n_samples:
        return
    pairs = tl.load(block_start_ptr + tl.program_id(0)) + tl.arange(0, BLOCK_M)
    pair_mask = pairs < tl.load(query_offsets_ptr + sample + 1) * GROUP_SIZE
    start, stop = tl.load(key_offsets_ptr + sample), tl.load(key_offsets_ptr + sample + 1)
    m_i = tl.full([BLOCK_M], -float("inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    for start_n in range(start, stop, BLOCK_N):
        cols = start_n + tl.arange(0, BLOCK_N)
        col_mask = cols < stop
        if HAS_CHOSEN:
            col_mask = col_mask & (tl.load(chosen_ptr + cols, mask=col_mask, other=0) != 0)
        logits = _logits(
            q_ptr, k_ptr, order_ptr, pairs, pair_mask, cols, col_mask, start, kv_head, scaling, softcap,
            stride_qm, stride_qh, stride_qd, stride_kn, stride_kh, stride_kd, GROUP_SIZE, HEAD_DIM, BLOCK_D,
            HAS_SOFTCAP,
        )  # fmt: skip
        m_new = tl.maximum(m_i, tl.max(logits, 1))
        m_base = tl.where(m_new == -float("inf"), 0.0, m_new)
        l_i = l_i * tl.exp(m_i - m_base) + tl.sum(tl.exp(logits - m_base[:, None]), 1)
        m_i = m_new
    offs = (pairs // GROUP_SIZE) * n_heads + kv_head * GROUP_SIZE + pairs % GROUP_SIZE
    lse = tl.where(l_i > 0, m_i + tl.log(l_i), -float("inf"))
    tl.store(lse_ptr + offs, lse, mask=pair_mask)


@triton.jit
def _reduce(
    q_ptr, k_ptr, v_ptr, order_ptr, block_sample_ptr, block_start_ptr, query_offsets_ptr, key_offsets_ptr,
    column_offsets_ptr, columns_ptr, lse_ptr, weights_ptr, out_ptr, n_samples, n_heads, n_columns, scaling, softcap,
    power, stride_qm, stride_qh, stride_qd, stride_kn, stride_kh, stride_kd, stride_vn, stride_vh, stride_vd,
    KIND: tl.constexpr, V_DIM: tl.constexpr, BLOCK_V: tl.constexpr, GROUP_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Reduces a block of columns over the (row, head) pairs of one KV head.

    `KIND` "attention": weighted sum of the attention; "sum": log of the sum of (attention |v|)^power; "max": log of the
    largest attention |v|.
    """
    sample, kv_head = tl.load(block_sample_ptr + tl.program_id(0)), tl.program_id(1)
    if sample >= n_samples:
        return
    cols = tl.load(block_start_ptr + tl.program_id(0)) + tl.arange(0, BLOCK_N)
    col_mask = cols < tl.load(column_offsets_ptr + sample + 1)
    start = tl.load(key_offsets_ptr + sample)
    key_rows = tl.load(columns_ptr + cols, mask=col_mask, other=0)
    m_i = tl.full([BLOCK_N], -float("inf"), tl.float32)
    l_i = tl.zeros([BLOCK_N], tl.float32)
    log_norm = tl.zeros([BLOCK_N], tl.float32)
    if KIND != "attention":
        offs_v = tl.arange(0, BLOCK_V)
        v_offs = key_rows.to(tl.int64) * stride_vn + kv_head * stride_vh
        mask = col_mask[:, None] & (offs_v < V_DIM)[None, :]
        v = tl.load(v_ptr + v_offs[:, None] + offs_v[None, :] * stride_vd, mask=mask, other=0.0).to(tl.float32)
        log_norm = tl.log(tl.sqrt(tl.sum(v * v, 1)) + 1e-12)
    begin, end = tl.load(query_offsets_ptr + sample) * GROUP_SIZE, tl.load(query_offsets_ptr + sample + 1) * GROUP_SIZE
    for start_m in range(begin, end, BLOCK_M):
        pairs = start_m + tl.arange(0, BLOCK_M)
        pair_mask = pairs < end
        logits = _logits(
            q_ptr, k_ptr, order_ptr, pairs, pair_mask, key_rows, col_mask, start, kv_head, scaling, softcap,
            stride_qm, stride_qh, stride_qd, stride_kn, stride_kh, stride_kd, GROUP_SIZE, HEAD_DIM, BLOCK_D,
            HAS_SOFTCAP,
        )  # fmt: skip
        offs = (pairs // GROUP_SIZE) * n_heads + kv_head * GROUP_SIZE + pairs % GROUP_SIZE
        lse = tl.load(lse_ptr + offs, mask=pair_mask, other=-float("inf"))
        logits = tl.where((lse > -float("inf"))[:, None], logits - lse[:, None], -float("inf"))
        if KIND == "attention":
            weight = tl.load(weights_ptr + pairs // GROUP_SIZE, mask=pair_mask, other=0.0)
            l_i += tl.sum(tl.exp(logits) * weight[:, None], 0)
        elif KIND == "max":
            m_i = tl.maximum(m_i, tl.max(logits, 0) + log_norm)
        else:
            logits = power * (logits + log_norm[None, :])
            m_new = tl.maximum(m_i, tl.max(logits, 0))
            m_base = tl.where(m_new == -float("inf"), 0.0, m_new)
            l_i = l_i * tl.exp(m_i - m_base) + tl.sum(tl.exp(logits - m_base[None, :]), 0)
            m_i = m_new
    if KIND == "attention":
        m_i = l_i
    elif KIND == "sum":
        m_i = tl.where(l_i > 0, m_i + tl.log(l_i), -float("inf"))
    tl.store(out_ptr + kv_head.to(tl.int64) * n_columns + cols, m_i, mask=col_mask)


@triton.jit
def _write(
    q_ptr, k_ptr, order_ptr, block_sample_ptr, block_start_ptr, query_offsets_ptr, key_offsets_ptr, lse_ptr, out_ptr,
    n_samples, n_heads, n_rows, max_length, scaling, softcap, stride_qm, stride_qh, stride_qd, stride_kn, stride_kh,
    stride_kd,
    GROUP_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Writes the attention of a block of (row, head) pairs over a block of their keys."""
    sample, kv_head = tl.load(block_sample_ptr + tl.program_id(0)), tl.program_id(1)
    if sample >= n_samples:
        return
    pairs = tl.load(block_start_ptr + tl.program_id(0)) + tl.arange(0, BLOCK_M)
    pair_mask = pairs < tl.load(query_offsets_ptr + sample + 1) * GROUP_SIZE
    start, stop = tl.load(key_offsets_ptr + sample), tl.load(key_offsets_ptr + sample + 1)
    cols = start + tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    col_mask = cols < stop
    logits = _logits(
        q_ptr, k_ptr, order_ptr, pairs, pair_mask, cols, col_mask, start, kv_head, scaling, softcap,
        stride_qm, stride_qh, stride_qd, stride_kn, stride_kh, stride_kd, GROUP_SIZE, HEAD_DIM, BLOCK_D, HAS_SOFTCAP,
    )  # fmt: skip
    rows, head = pairs // GROUP_SIZE, kv_head * GROUP_SIZE + pairs % GROUP_SIZE
    lse = tl.load(lse_ptr + rows * n_heads + head, mask=pair_mask, other=0.0)
    offs = (head.to(tl.int64) * n_rows + rows) * max_length
    mask = pair_mask[:, None] & col_mask[None, :]
    tl.store(out_ptr + offs[:, None] + (cols - start)[None, :], tl.exp(logits - lse[:, None]), mask=mask)


def normalizers(rows: Rows, chosen: Tensor | None = None) -> Tensor:
    """Log-sum-exp `[R, H]` of the logits over visible keys, or over those marked in `chosen` `[C]` uint8."""
    (count, heads, _), groups = rows.queries.shape, rows.keys.shape[1]
    tile = rows.tile
    pairs = rows.query_offsets * (heads // groups)
    owner, first = blocks(pairs, count * (heads // groups), int(tile["BLOCK_M"]))
    result = torch.full((count, heads), NEVER, device=rows.keys.device, dtype=torch.float32)
    _normalize[(len(owner), groups)](
        rows.queries, rows.keys, rows.order, owner, first, rows.query_offsets, rows.key_offsets,
        rows.order if chosen is None else chosen, result, len(rows.key_offsets) - 1, heads, rows.scaling, rows.softcap,
        *rows.strides, HAS_CHOSEN=chosen is not None, **tile,
    )  # fmt: skip
    return result


def reduce_columns(
    rows: Rows,
    normalizer: Tensor,
    columns: Tensor,
    column_offsets: Tensor,
    kind: str,
    values: Tensor | None = None,
    weights: Tensor | None = None,
    power: float = 1.0,
) -> Tensor:
    """Reduction `[G, M]` per KV head and column, see `_reduce`."""
    tile, groups = rows.tile, rows.keys.shape[1]
    values = rows.keys if values is None else values
    owner, first = blocks(column_offsets, len(columns), int(tile["BLOCK_N"]))
    result = torch.zeros(groups, len(columns), device=rows.keys.device, dtype=torch.float32)
    _reduce[(len(owner), groups)](
        rows.queries, rows.keys, values, rows.order, owner, first, rows.query_offsets, rows.key_offsets,
        column_offsets, columns, normalizer, normalizer if weights is None else weights, result,
        len(rows.key_offsets) - 1, rows.queries.shape[1], len(columns), rows.scaling, rows.softcap, power,
        *rows.strides, *values.stride(), KIND=kind, V_DIM=values.shape[-1], BLOCK_V=power_of_two(values.shape[-1]),
        **tile,
    )  # fmt: skip
    return result


def write_rows(rows: Rows, normalizer: Tensor, max_length: int) -> Tensor:
    """Attention `[H, R, max_length]`, zero beyond a sample's keys."""
    (count, heads, _), groups, tile = rows.queries.shape, rows.keys.shape[1], rows.tile
    owner, first = blocks(rows.query_offsets * (heads // groups), count * (heads // groups), int(tile["BLOCK_M"]))
    result = torch.zeros(heads, count, max_length, device=rows.keys.device, dtype=torch.float32)
    _write[(len(owner), groups, -(-max_length // int(tile["BLOCK_N"])))](
        rows.queries, rows.keys, rows.order, owner, first, rows.query_offsets, rows.key_offsets, normalizer, result,
        len(rows.key_offsets) - 1, heads, count, max_length, rows.scaling, rows.softcap, *rows.strides, **tile,
    )  # fmt: skip
    return result
