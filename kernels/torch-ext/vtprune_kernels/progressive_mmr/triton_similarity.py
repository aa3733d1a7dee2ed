# SPDX-License-Identifier: Apache-2.0
"""Similarities of rank-one updates on a GPU, in tiles on the matrix cores.

`|k_i - k_j|^2` is computed from lengths and a product. Products of half-precision keys are exact in float32; float32
keys are first shifted by their mean, which changes no distance but avoids cancellation due to a shared bias.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import WIDEN, power_of_two


@triton.jit
def _measure(
    keys, values, shift, halves, inverses, total, scaling, key_row, key_head, key_column, value_row, value_head,
    value_column, SHIFT: tl.constexpr, KV_HEADS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, PART: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Computes `scaling |k|^2 / 2` and `1 / |v|` of a block of rows; the latter is 0 for values that are not finite."""
    kv_head = tl.program_id(1)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside, at = rows < total, rows.to(tl.int64)
    square = tl.zeros([ROWS], tl.float32)
    for part in range(0, DK, PART):
        k = part + tl.arange(0, PART)
        mask = inside[:, None] & (k < DK)[None, :]
        place = keys + (at * key_row + kv_head * key_head)[:, None] + k[None, :] * key_column
        key = tl.load(place, mask=mask, other=0.0).to(tl.float32)
        if SHIFT:
            key = tl.where(mask, key - tl.load(shift + kv_head * DK + k, mask=k < DK, other=0.0)[None, :], 0.0)
        square += tl.sum(key * key, 1)
    tl.store(halves + at * KV_HEADS + kv_head, square * (0.5 * scaling), mask=inside)
    square = tl.zeros([ROWS], tl.float32)
    for part in range(0, DV, PART):
        v = part + tl.arange(0, PART)
        place = values + (at * value_row + kv_head * value_head)[:, None] + v[None, :] * value_column
        value = tl.load(place, mask=inside[:, None] & (v < DV)[None, :], other=0.0).to(tl.float32)
        square += tl.sum(value * value, 1)
    length = tl.sqrt(square)
    finite = length < float("inf")
    tl.store(inverses + at * KV_HEADS + kv_head, tl.where(finite, 1 / tl.maximum(length, 1e-6), 0.0), mask=inside)


@triton.jit
def tile(
    keys, values, shift, halves, inverses, scaling, key_row, key_head, key_column, value_row, value_head,
    value_column, mine, inside, theirs, known, SHIFT: tl.constexpr, KV_HEADS: tl.constexpr, DK: tl.constexpr,
    DV: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Similarity `[A, B]` of the rows `mine` `[A]` and `theirs` `[B]`, averaged over the KV heads."""
    mine, theirs = mine.to(tl.int64), theirs.to(tl.int64)
    total = tl.zeros([mine.shape[0], theirs.shape[0]], tl.float32)
    for kv_head in range(KV_HEADS):
        at, there = mine * key_row + kv_head * key_head, theirs * key_row + kv_head * key_head
        product = tl.zeros([mine.shape[0], theirs.shape[0]], tl.float32)
        for part in range(0, DK, PART):
            k = part + tl.arange(0, PART)
            mask, their_mask = inside[:, None] & (k < DK)[None, :], known[None, :] & (k < DK)[:, None]
            a = tl.load(keys + at[:, None] + k[None, :] * key_column, mask=mask, other=0.0)
            b = tl.load(keys + there[None, :] + k[:, None] * key_column, mask=their_mask, other=0.0)
            if SHIFT:
                bias = tl.load(shift + kv_head * DK + k, mask=k < DK, other=0.0)
                a, b = tl.where(mask, a - bias[None, :], 0.0), tl.where(their_mask, b - bias[:, None], 0.0)
            if WIDEN:
                a, b = a.to(tl.float32), b.to(tl.float32)
            product = tl.dot(a, b, product, input_precision="ieee")
        exponent = scaling * product
        exponent -= tl.load(halves + mine * KV_HEADS + kv_head, mask=inside, other=0.0)[:, None]
        exponent -= tl.load(halves + theirs * KV_HEADS + kv_head, mask=known, other=0.0)[None, :]
        at, there = mine * value_row + kv_head * value_head, theirs * value_row + kv_head * value_head
        product = tl.zeros([mine.shape[0], theirs.shape[0]], tl.float32)
        for part in range(0, DV, PART):
            v = part + tl.arange(0, PART)
            mask, their_mask = inside[:, None] & (v < DV)[None, :], known[None, :] & (v < DV)[:, None]
            a = tl.load(values + at[:, None] + v[None, :] * value_column, mask=mask, other=0.0)
            b = tl.load(values + there[None, :] + v[:, None] * value_column, mask=their_mask, other=0.0)
            if WIDEN:
                a, b = a.to(tl.float32), b.to(tl.float32)
            product = tl.dot(a, b, product, input_precision="ieee")
        scale = tl.load(inverses + mine * KV_HEADS + kv_head, mask=inside, other=0.0)[:, None]
        scale = scale * tl.load(inverses + theirs * KV_HEADS + kv_head, mask=known, other=0.0)[None, :]
        total += tl.exp(tl.minimum(exponent, 0.0)) * tl.where(scale == 0, 0.0, product * scale)
    return total / KV_HEADS


@triton.jit(do_not_specialize=["first", "side"])
def _matrix(
    keys, values, shift, halves, inverses, scaling, key_row, key_head, key_column, value_row, value_head,
    value_column, rows, offsets, first, side, result, CHOSEN: tl.constexpr, TILE: tl.constexpr, SHIFT: tl.constexpr,
    KV_HEADS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """One tile of the similarities of a group's rows, or with `CHOSEN` of those in `rows`, and its mirror image."""
    upper, lower, slot = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, stop = tl.load(offsets + first + slot), tl.load(offsets + first + slot + 1)
    if (lower < upper) | ((start + lower * TILE >= stop) & (not CHOSEN)):
        return
    at, there = upper * TILE + tl.arange(0, TILE), lower * TILE + tl.arange(0, TILE)
    if CHOSEN:
        mine = tl.load(rows + slot * side + at, mask=at < side, other=-1)
        theirs = tl.load(rows + slot * side + there, mask=there < side, other=-1)
        inside, known = mine >= 0, theirs >= 0
    else:
        mine, theirs = start + at, start + there
        inside, known = mine < stop, theirs < stop
    total = tile(
        keys, values, shift, halves, inverses, scaling, key_row, key_head, key_column, value_row, value_head,
        value_column, mine, inside, theirs, known, SHIFT, KV_HEADS, DK, DV, PART,
    )  # fmt: skip
    result += slot.to(tl.int64) * side * side
    tl.store(result + at[:, None] * side + there[None, :], total, mask=inside[:, None] & known[None, :])
    if upper < lower:
        mask = known[:, None] & inside[None, :]
        tl.store(result + there[:, None] * side + at[None, :], tl.trans(total), mask=mask)


class Updates:
    """Rank-one updates of all rows, in the form that the kernels take, with lengths computed once.

    Args:
        keys: `[M, G, dk]`.
        values: `[M, G, dv]`.
        scaling: Factor of the attention's dot product, `dk ** -0.5` by default.

    Attributes:
        tensors: The first arguments of the function `tile`.
        sizes: Its compile-time arguments.
        tile: Number of rows of a tile, which fits into the registers of 256 threads.
    """

    def __init__(self, keys: Tensor, values: Tensor, scaling: float | None) -> None:
        (total, kv_heads, dk), dv = keys.shape, values.shape[-1]
        scaling = dk**-0.5 if scaling is None else scaling
        exact = keys.element_size() > 2
        part = min(64 if exact else 128, power_of_two(max(dk, dv)))
        halves, inverses = torch.empty(2, total, kv_heads, device=keys.device).unbind()
        self.sizes = {"SHIFT": exact, "KV_HEADS": kv_heads, "DK": dk, "DV": dv, "PART": part}
        shift = keys.mean(0) if exact else halves
        self.tensors = (keys, values, shift, halves, inverses, scaling, *keys.stride(), *values.stride())
        self.tile = 32 if exact else 64
        _measure[(triton.cdiv(total, 16), kv_heads)](*self.tensors[:5], total, *self.tensors[5:], ROWS=16, **self.sizes)

    def matrix(self, offsets: Tensor, first: int, result: Tensor, rows: Tensor | None = None) -> None:
        """Writes the similarities of all pairs of rows in the same group.

        Args:
            offsets: `[S + 1]` offsets of the groups.
            first: The first group.
            result: `[P, side, side]` float32 output for groups `first` to `first + P`; `side` is at least their length.
            rows: `[P, side]` int64 rows to compare instead of all of the group, padded with -1.
        """
        groups, side, _ = result.shape
        tiles = triton.cdiv(side, self.tile)
        _matrix[(tiles, tiles, groups)](
            *self.tensors, offsets if rows is None else rows, offsets, first, side, result, CHOSEN=rows is not None,
            TILE=self.tile, num_warps=8, num_stages=1, **self.sizes,
        )  # fmt: skip
