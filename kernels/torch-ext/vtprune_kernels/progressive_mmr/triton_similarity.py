# SPDX-License-Identifier: Apache-2.0
"""Similarities of rank-one updates on a GPU, in tiles on the tensor cores.

`|k_i - k_j|^2` is computed from norms and a product. Products of half-precision keys are exact in float32; float32
keys are first centered, which changes no distance but avoids cancellation due to a shared bias.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import WIDEN, power_of_two


@triton.jit
def _measure(
    k_ptr, v_ptr, shift_ptr, half_sq_ptr, inv_norm_ptr, n_rows, scaling, stride_kn, stride_kh, stride_kd, stride_vn,
    stride_vh, stride_vd,
    HAS_SHIFT: tl.constexpr, KV_HEADS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Computes `scaling |k|^2 / 2` and `1 / |v|` of a block of rows; the latter is 0 where |v| is not finite."""
    kv_head = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask, offs_m = rows < n_rows, rows.to(tl.int64)
    sum_sq = tl.zeros([BLOCK_M], tl.float32)
    for start_d in range(0, DK, BLOCK_D):
        offs_k = start_d + tl.arange(0, BLOCK_D)
        mask = row_mask[:, None] & (offs_k < DK)[None, :]
        ptrs = k_ptr + (offs_m * stride_kn + kv_head * stride_kh)[:, None] + offs_k[None, :] * stride_kd
        k = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
        if HAS_SHIFT:
            k = tl.where(
                mask, k - tl.load(shift_ptr + kv_head * DK + offs_k, mask=offs_k < DK, other=0.0)[None, :], 0.0
            )
        sum_sq += tl.sum(k * k, 1)
    tl.store(half_sq_ptr + offs_m * KV_HEADS + kv_head, sum_sq * (0.5 * scaling), mask=row_mask)
    sum_sq = tl.zeros([BLOCK_M], tl.float32)
    for start_d in range(0, DV, BLOCK_D):
        offs_v = start_d + tl.arange(0, BLOCK_D)
        ptrs = v_ptr + (offs_m * stride_vn + kv_head * stride_vh)[:, None] + offs_v[None, :] * stride_vd
        v = tl.load(ptrs, mask=row_mask[:, None] & (offs_v < DV)[None, :], other=0.0).to(tl.float32)
        sum_sq += tl.sum(v * v, 1)
    norm = tl.sqrt(sum_sq)
    finite = norm < float("inf")
    tl.store(
        inv_norm_ptr + offs_m * KV_HEADS + kv_head, tl.where(finite, 1 / tl.maximum(norm, 1e-6), 0.0), mask=row_mask
    )


@triton.jit
def tile(
    k_ptr, v_ptr, shift_ptr, half_sq_ptr, inv_norm_ptr, scaling, stride_kn, stride_kh, stride_kd, stride_vn, stride_vh,
    stride_vd, rows, row_mask, cols, col_mask,
    HAS_SHIFT: tl.constexpr, KV_HEADS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Similarity `[A, B]` of the rows `rows` `[A]` and `cols` `[B]`, averaged over the KV heads."""
    rows, cols = rows.to(tl.int64), cols.to(tl.int64)
    acc = tl.zeros([rows.shape[0], cols.shape[0]], tl.float32)
    for kv_head in range(KV_HEADS):
        row_offs, col_offs = rows * stride_kn + kv_head * stride_kh, cols * stride_kn + kv_head * stride_kh
        dot = tl.zeros([rows.shape[0], cols.shape[0]], tl.float32)
        for start_d in range(0, DK, BLOCK_D):
            offs_k = start_d + tl.arange(0, BLOCK_D)
            a_mask, b_mask = row_mask[:, None] & (offs_k < DK)[None, :], col_mask[None, :] & (offs_k < DK)[:, None]
            a = tl.load(k_ptr + row_offs[:, None] + offs_k[None, :] * stride_kd, mask=a_mask, other=0.0)
            b = tl.load(k_ptr + col_offs[None, :] + offs_k[:, None] * stride_kd, mask=b_mask, other=0.0)
            if HAS_SHIFT:
                bias = tl.load(shift_ptr + kv_head * DK + offs_k, mask=offs_k < DK, other=0.0)
                a, b = tl.where(a_mask, a - bias[None, :], 0.0), tl.where(b_mask, b - bias[:, None], 0.0)
            if WIDEN:
                a, b = a.to(tl.float32), b.to(tl.float32)
            dot = tl.dot(a, b, dot, input_precision="ieee")
        exponent = scaling * dot
        exponent -= tl.load(half_sq_ptr + rows * KV_HEADS + kv_head, mask=row_mask, other=0.0)[:, None]
        exponent -= tl.load(half_sq_ptr + cols * KV_HEADS + kv_head, mask=col_mask, other=0.0)[None, :]
        row_offs, col_offs = rows * stride_vn + kv_head * stride_vh, cols * stride_vn + kv_head * stride_vh
        dot = tl.zeros([rows.shape[0], cols.shape[0]], tl.float32)
        for start_d in range(0, DV, BLOCK_D):
            offs_v = start_d + tl.arange(0, BLOCK_D)
            a_mask, b_mask = row_mask[:, None] & (offs_v < DV)[None, :], col_mask[None, :] & (offs_v < DV)[:, None]
            a = tl.load(v_ptr + row_offs[:, None] + offs_v[None, :] * stride_vd, mask=a_mask, other=0.0)
            b = tl.load(v_ptr + col_offs[None, :] + offs_v[:, None] * stride_vd, mask=b_mask, other=0.0)
            if WIDEN:
                a, b = a.to(tl.float32), b.to(tl.float32)
            dot = tl.dot(a, b, dot, input_precision="ieee")
        scale = tl.load(inv_norm_ptr + rows * KV_HEADS + kv_head, mask=row_mask, other=0.0)[:, None]
        scale = scale * tl.load(inv_norm_ptr + cols * KV_HEADS + kv_head, mask=col_mask, other=0.0)[None, :]
        acc += tl.exp(tl.minimum(exponent, 0.0)) * tl.where(scale == 0, 0.0, dot * scale)
    return acc / KV_HEADS


@triton.jit(do_not_specialize=["first_group", "side"])
def _matrix(
    k_ptr, v_ptr, shift_ptr, half_sq_ptr, inv_norm_ptr, scaling, stride_kn, stride_kh, stride_kd, stride_vn, stride_vh,
    stride_vd, rows_ptr, offsets_ptr, first_group, side, out_ptr,
    HAS_ROWS: tl.constexpr, BLOCK_N: tl.constexpr, HAS_SHIFT: tl.constexpr, KV_HEADS: tl.constexpr, DK: tl.constexpr,
    DV: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Computes a tile of the similarities of a group's rows, or with `HAS_ROWS` of `rows_ptr`, and its transpose."""
    pid_m, pid_n, slot = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, stop = tl.load(offsets_ptr + first_group + slot), tl.load(offsets_ptr + first_group + slot + 1)
    if (pid_n < pid_m) | ((start + pid_n * BLOCK_N >= stop) & (not HAS_ROWS)):
        return
    offs_m, offs_n = pid_m * BLOCK_N + tl.arange(0, BLOCK_N), pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if HAS_ROWS:
        rows = tl.load(rows_ptr + slot * side + offs_m, mask=offs_m < side, other=-1)
        cols = tl.load(rows_ptr + slot * side + offs_n, mask=offs_n < side, other=-1)
        row_mask, col_mask = rows >= 0, cols >= 0
    else:
        rows, cols = start + offs_m, start + offs_n
        row_mask, col_mask = rows < stop, cols < stop
    similarity = tile(
        k_ptr, v_ptr, shift_ptr, half_sq_ptr, inv_norm_ptr, scaling, stride_kn, stride_kh, stride_kd, stride_vn,
        stride_vh,
        stride_vd, rows, row_mask, cols, col_mask, HAS_SHIFT, KV_HEADS, DK, DV, BLOCK_D,
    )  # fmt: skip
    out_ptr += slot.to(tl.int64) * side * side
    tl.store(out_ptr + offs_m[:, None] * side + offs_n[None, :], similarity, mask=row_mask[:, None] & col_mask[None, :])
    if pid_m < pid_n:
        mask = col_mask[:, None] & row_mask[None, :]
        tl.store(out_ptr + offs_n[:, None] * side + offs_m[None, :], tl.trans(similarity), mask=mask)


class Updates:
    """Kernel arguments of the rank-one updates of all rows, with norms computed once.

    Args:
        keys: `[M, G, dk]`.
        values: `[M, G, dv]`.
        scaling: Factor of the attention logits, by default `dk ** -0.5`.

    Attributes:
        tensors: First arguments of the kernel function `tile`.
        sizes: Its `constexpr` arguments.
        tile: Rows per tile, limited by the registers of 256 threads.
    """

    def __init__(self, keys: Tensor, values: Tensor, scaling: float | None) -> None:
        (total, kv_heads, dk), dv = keys.shape, values.shape[-1]
        scaling = dk**-0.5 if scaling is None else scaling
        exact = keys.element_size() > 2
        part = min(64 if exact else 128, power_of_two(max(dk, dv)))
        halves, inverses = torch.empty(2, total, kv_heads, device=keys.device, dtype=torch.float32).unbind()
        self.sizes = {"HAS_SHIFT": exact, "KV_HEADS": kv_heads, "DK": dk, "DV": dv, "BLOCK_D": part}
        shift = keys.mean(0) if exact else halves
        self.tensors = (keys, values, shift, halves, inverses, scaling, *keys.stride(), *values.stride())
        self.tile = 32 if exact else 64
        _measure[(triton.cdiv(total, 16), kv_heads)](
            *self.tensors[:5], total, *self.tensors[5:], BLOCK_M=16, **self.sizes
        )

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
            *self.tensors, offsets if rows is None else rows, offsets, first, side, result, HAS_ROWS=rows is not None,
            BLOCK_N=self.tile, num_warps=8, num_stages=1, **self.sizes,
        )  # fmt: skip
