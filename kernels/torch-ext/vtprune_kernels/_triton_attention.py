# SPDX-License-Identifier: Apache-2.0
"""Attention logits on a GPU, reduced over queries or over keys as they are computed, or written out.

Query rows of one KV group are ordered as (row, head) pairs, so that grouped heads share a tile.
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
        shape = {"PER_GROUP": per_group, "SIZE": self.keys.shape[-1], "SIZE_BLOCK": size, "CAP": self.softcap > 0}
        return {**shape, "Q": 16 if large else 32, "K": 16 if large else 64, "num_stages": 1 if large else 2}


def rows_of(
    queries: Tensor,
    keys: Tensor,
    query_offsets: Tensor,
    key_offsets: Tensor,
    order: Tensor,
    scaling: float,
    softcap: float | None,
) -> Rows:
    """Brings offsets to the device of the keys and the two operands to one dtype."""
    dtype = torch.promote_types(queries.dtype, keys.dtype)
    device = keys.device
    starts, key_starts = on(query_offsets, device), on(key_offsets, device)
    return Rows(queries.to(dtype), keys.to(dtype), starts, key_starts, on(order, device), scaling, softcap or 0.0)


@triton.jit
def _logits(
    queries, keys, order, pairs, pair_inside, rows, row_inside, start, group, scaling, softcap,
    query_row, query_head, query_column, key_row, key_group, key_column,
    PER_GROUP: tl.constexpr, SIZE: tl.constexpr, SIZE_BLOCK: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """Logits `[Q, K]` of (row, head) pairs and keys; minus infinity for masked keys."""
    column = tl.arange(0, SIZE_BLOCK)
    at = pairs // PER_GROUP
    head = group * PER_GROUP + pairs % PER_GROUP
    place = at.to(tl.int64) * query_row + head * query_head
    mask = pair_inside[:, None] & (column < SIZE)[None, :]
    q = tl.load(queries + place[:, None] + column[None, :] * query_column, mask=mask, other=0.0)
    place = rows.to(tl.int64) * key_row + group * key_group
    mask = row_inside[None, :] & (column < SIZE)[:, None]
    k = tl.load(keys + place[None, :] + column[:, None] * key_column, mask=mask, other=0.0)
    if WIDEN:
        q, k = q.to(tl.float32), k.to(tl.float32)
    logits = tl.dot(q, k, input_precision="ieee") * scaling
    if CAP:
        small = tl.exp(-2 * tl.abs(logits) / softcap)
        logits = tl.where(logits < 0, -softcap, softcap) * (1 - small) / (1 + small)
    last = tl.load(order + at, mask=pair_inside, other=-1)
    visible = pair_inside[:, None] & row_inside[None, :] & ((rows - start)[None, :] <= last[:, None])
    return tl.where(visible, logits, -float("inf"))


@triton.jit
def _normalize(
    queries, keys, order, owner, first, query_offsets, key_offsets, chosen, result, samples, heads, scaling, softcap,
    query_row, query_head, query_column, key_row, key_group, key_column,
    CHOSEN: tl.constexpr, PER_GROUP: tl.constexpr, SIZE: tl.constexpr, SIZE_BLOCK: tl.constexpr, CAP: tl.constexpr,
    Q: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of every (row, head) over its visible keys, or over those of them marked in `chosen`."""
    sample, group = tl.load(owner + tl.program_id(0)), tl.program_id(1)
    if sample >= samples:
        return
    pairs = tl.load(first + tl.program_id(0)) + tl.arange(0, Q)
    inside = pairs < tl.load(query_offsets + sample + 1) * PER_GROUP
    start, stop = tl.load(key_offsets + sample), tl.load(key_offsets + sample + 1)
    top = tl.full([Q], -float("inf"), tl.float32)
    total = tl.zeros([Q], tl.float32)
    for key in range(start, stop, K):
        rows = key + tl.arange(0, K)
        seen = rows < stop
        if CHOSEN:
            seen = seen & (tl.load(chosen + rows, mask=seen, other=0) != 0)
        logits = _logits(
            queries, keys, order, pairs, inside, rows, seen, start, group, scaling, softcap,
            query_row, query_head, query_column, key_row, key_group, key_column, PER_GROUP, SIZE, SIZE_BLOCK, CAP,
        )  # fmt: skip
        new = tl.maximum(top, tl.max(logits, 1))
        base = tl.where(new == -float("inf"), 0.0, new)
        total = total * tl.exp(top - base) + tl.sum(tl.exp(logits - base[:, None]), 1)
        top = new
    place = (pairs // PER_GROUP) * heads + group * PER_GROUP + pairs % PER_GROUP
    value = tl.where(total > 0, top + tl.log(total), -float("inf"))
    tl.store(result + place, value, mask=inside)


@triton.jit
def _reduce(
    queries, keys, values, order, owner, first, query_offsets, key_offsets, column_offsets, columns, normalizer,
    weights, result, samples, heads, total_columns, scaling, softcap, power,
    query_row, query_head, query_column, key_row, key_group, key_column, value_row, value_group, value_column,
    KIND: tl.constexpr, VALUE: tl.constexpr, VALUE_BLOCK: tl.constexpr, PER_GROUP: tl.constexpr, SIZE: tl.constexpr,
    SIZE_BLOCK: tl.constexpr, CAP: tl.constexpr, Q: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Reduces a block of columns over the (row, head) pairs of one KV group.

    `KIND` "attention": weighted sum of the attention; "sum": log of the sum of (attention |v|)^power; "max": log of the
    largest attention |v|.
    """
    sample, group = tl.load(owner + tl.program_id(0)), tl.program_id(1)
    if sample >= samples:
        return
    column = tl.load(first + tl.program_id(0)) + tl.arange(0, K)
    inside = column < tl.load(column_offsets + sample + 1)
    start = tl.load(key_offsets + sample)
    rows = tl.load(columns + column, mask=inside, other=0)
    top = tl.full([K], -float("inf"), tl.float32)
    total = tl.zeros([K], tl.float32)
    length = tl.zeros([K], tl.float32)
    if KIND != "attention":
        part = tl.arange(0, VALUE_BLOCK)
        at = rows.to(tl.int64) * value_row + group * value_group
        mask = inside[:, None] & (part < VALUE)[None, :]
        v = tl.load(values + at[:, None] + part[None, :] * value_column, mask=mask, other=0.0).to(tl.float32)
        length = tl.log(tl.sqrt(tl.sum(v * v, 1)) + 1e-12)
    begin, end = tl.load(query_offsets + sample) * PER_GROUP, tl.load(query_offsets + sample + 1) * PER_GROUP
    for pair in range(begin, end, Q):
        pairs = pair + tl.arange(0, Q)
        known = pairs < end
        logits = _logits(
            queries, keys, order, pairs, known, rows, inside, start, group, scaling, softcap,
            query_row, query_head, query_column, key_row, key_group, key_column, PER_GROUP, SIZE, SIZE_BLOCK, CAP,
        )  # fmt: skip
        place = (pairs // PER_GROUP) * heads + group * PER_GROUP + pairs % PER_GROUP
        z = tl.load(normalizer + place, mask=known, other=-float("inf"))
        logits = tl.where((z > -float("inf"))[:, None], logits - z[:, None], -float("inf"))
        if KIND == "attention":
            weight = tl.load(weights + pairs // PER_GROUP, mask=known, other=0.0)
            total += tl.sum(tl.exp(logits) * weight[:, None], 0)
        elif KIND == "max":
            top = tl.maximum(top, tl.max(logits, 0) + length)
        else:
            logits = power * (logits + length[None, :])
            new = tl.maximum(top, tl.max(logits, 0))
            base = tl.where(new == -float("inf"), 0.0, new)
            total = total * tl.exp(top - base) + tl.sum(tl.exp(logits - base[None, :]), 0)
            top = new
    if KIND == "attention":
        top = total
    elif KIND == "sum":
        top = tl.where(total > 0, top + tl.log(total), -float("inf"))
    tl.store(result + group.to(tl.int64) * total_columns + column, top, mask=inside)


@triton.jit
def _write(
    queries, keys, order, owner, first, query_offsets, key_offsets, normalizer, result, samples, heads, all_rows,
    max_length, scaling, softcap, query_row, query_head, query_column, key_row, key_group, key_column,
    PER_GROUP: tl.constexpr, SIZE: tl.constexpr, SIZE_BLOCK: tl.constexpr, CAP: tl.constexpr, Q: tl.constexpr,
    K: tl.constexpr,
):  # fmt: skip
    """Writes the attention of a block of (row, head) pairs over a block of their keys."""
    sample, group = tl.load(owner + tl.program_id(0)), tl.program_id(1)
    if sample >= samples:
        return
    pairs = tl.load(first + tl.program_id(0)) + tl.arange(0, Q)
    inside = pairs < tl.load(query_offsets + sample + 1) * PER_GROUP
    start, stop = tl.load(key_offsets + sample), tl.load(key_offsets + sample + 1)
    rows = start + tl.program_id(2) * K + tl.arange(0, K)
    seen = rows < stop
    logits = _logits(
        queries, keys, order, pairs, inside, rows, seen, start, group, scaling, softcap,
        query_row, query_head, query_column, key_row, key_group, key_column, PER_GROUP, SIZE, SIZE_BLOCK, CAP,
    )  # fmt: skip
    at, head = pairs // PER_GROUP, group * PER_GROUP + pairs % PER_GROUP
    z = tl.load(normalizer + at * heads + head, mask=inside, other=0.0)
    place = (head.to(tl.int64) * all_rows + at) * max_length
    mask = inside[:, None] & seen[None, :]
    tl.store(result + place[:, None] + (rows - start)[None, :], tl.exp(logits - z[:, None]), mask=mask)


def normalizers(rows: Rows, chosen: Tensor | None = None) -> Tensor:
    """Log-sum-exp `[R, H]` of the logits over the visible keys, or over those marked in `chosen` `[C]` uint8."""
    (count, heads, _), groups = rows.queries.shape, rows.keys.shape[1]
    tile = rows.tile
    pairs = rows.query_offsets * (heads // groups)
    owner, first = blocks(pairs, count * (heads // groups), int(tile["Q"]))
    result = torch.full((count, heads), NEVER, device=rows.keys.device)
    _normalize[(len(owner), groups)](
        rows.queries, rows.keys, rows.order, owner, first, rows.query_offsets, rows.key_offsets,
        rows.order if chosen is None else chosen, result, len(rows.key_offsets) - 1, heads, rows.scaling, rows.softcap,
        *rows.strides, CHOSEN=chosen is not None, **tile,
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
    """Reduction `[G, M]` per KV group and column, see `_reduce`."""
    tile, groups = rows.tile, rows.keys.shape[1]
    values = rows.keys if values is None else values
    owner, first = blocks(column_offsets, len(columns), int(tile["K"]))
    result = torch.zeros(groups, len(columns), device=rows.keys.device)
    _reduce[(len(owner), groups)](
        rows.queries, rows.keys, values, rows.order, owner, first, rows.query_offsets, rows.key_offsets,
        column_offsets, columns, normalizer, normalizer if weights is None else weights, result,
        len(rows.key_offsets) - 1, rows.queries.shape[1], len(columns), rows.scaling, rows.softcap, power,
        *rows.strides, *values.stride(), KIND=kind, VALUE=values.shape[-1], VALUE_BLOCK=power_of_two(values.shape[-1]),
        **tile,
    )  # fmt: skip
    return result


def write_rows(rows: Rows, normalizer: Tensor, max_length: int) -> Tensor:
    """Attention `[H, R, max_length]`, zero beyond a sample's keys."""
    (count, heads, _), groups, tile = rows.queries.shape, rows.keys.shape[1], rows.tile
    owner, first = blocks(rows.query_offsets * (heads // groups), count * (heads // groups), int(tile["Q"]))
    result = torch.zeros(heads, count, max_length, device=rows.keys.device)
    _write[(len(owner), groups, -(-max_length // int(tile["K"])))](
        rows.queries, rows.keys, rows.order, owner, first, rows.query_offsets, rows.key_offsets, normalizer, result,
        len(rows.key_offsets) - 1, heads, count, max_length, rows.scaling, rows.softcap, *rows.strides, **tile,
    )  # fmt: skip
    return result
