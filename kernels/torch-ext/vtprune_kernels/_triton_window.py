# SPDX-License-Identifier: Apache-2.0
"""Products of a window of likely picks with all rows, computed ahead of the picks of a long group on a GPU.

A greedy selection from a group that is too long for a matrix of all pairs would read all features at every pick. Since
values never rise, most next picks are among the rows with the largest current values: the products of this window with
all rows are computed together, on tensor cores, in one pass over the features. A pick outside the window reads the
features and requests a new window. The host does not read these requests; unneeded launches return immediately.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton import WIDEN, ordered

WINDOW_BYTES = 32_000_000
EVERY = 8  # picks between checks for requests of a new window
_SCAN, _LINES, _TILE = 4096, 64, 128


@triton.jit(do_not_specialize=["step", "side"])
def _select(
    values_ptr, offsets_ptr, budget_ptr, missed_ptr, renewed_ptr, taken_ptr, rows_ptr, slots_ptr, step, side,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Fills a group's window with about the `side` largest values, if a pick was outside the last window."""
    group = tl.program_id(0)
    renew = (tl.load(missed_ptr + group) != 0) & (step < tl.load(budget_ptr + group))
    tl.store(renewed_ptr + group, renew.to(tl.int32))
    if not renew:
        return
    start, stop = tl.load(offsets_ptr + group), tl.load(offsets_ptr + group + 1)
    lo, hi = tl.full([], -0x7FFFFFFF, tl.int64), tl.full([], 0x7F800000, tl.int64)
    n_found = tl.full([], 0x7FFFFFFF, tl.int32)
    while (lo < hi) & (n_found != side):
        mid = lo + (hi - lo + 1) // 2
        n_reaching = tl.full([], 0, tl.int32)
        for start_n in range(start, stop, BLOCK_N):
            rows = start_n + tl.arange(0, BLOCK_N)
            value = tl.load(values_ptr + rows, mask=rows < stop, other=-float("inf"))
            n_reaching += tl.sum((ordered(value) >= mid).to(tl.int32), 0)
        enough = n_reaching >= side
        lo = tl.where(enough, mid, lo)
        n_found = tl.where(enough, n_reaching, n_found)
        hi = tl.where(enough, hi, mid - 1)
    n_filled = tl.full([], 0, tl.int32)
    for start_n in range(start, stop, BLOCK_N):
        rows = start_n + tl.arange(0, BLOCK_N)
        value = tl.load(values_ptr + rows, mask=rows < stop, other=-float("inf"))
        mask = (ordered(value) >= lo) & (value > -float("inf"))
        slots = n_filled + tl.cumsum(mask.to(tl.int32), 0) - 1
        mask = mask & (slots < side)
        tl.store(rows_ptr + group * side + slots, rows, mask=mask)
        tl.store(slots_ptr + rows, tl.where(mask, slots, -1), mask=rows < stop)
        n_filled += tl.sum(mask.to(tl.int32), 0)
    for start_n in range(n_filled, side, BLOCK_N):
        slots = start_n + tl.arange(0, BLOCK_N)
        tl.store(rows_ptr + group * side + slots, tl.zeros([BLOCK_N], tl.int64) - 1, mask=slots < side)
    tl.debug_barrier()  # all threads have read `missed_ptr`
    tl.store(missed_ptr + group, 0)
    tl.store(taken_ptr + group, step - 1)


@triton.jit(do_not_specialize=["side", "n_rows"])
def _products(
    x_ptr, stride_xm, stride_xd, factor_ptr, chol_ptr, offsets_ptr, renewed_ptr, taken_ptr, rows_ptr, out_ptr, side,
    max_length, n_rows,
    HAS_CHOLESKY: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Computes one tile of the scaled products of a window's rows with all rows of the group.

    `HAS_CHOLESKY` subtracts the products of the first `taken` rows of a Cholesky factor `[K, M]`.
    """
    group = tl.program_id(2)
    if tl.load(renewed_ptr + group) == 0:
        return
    start, stop = tl.load(offsets_ptr + group), tl.load(offsets_ptr + group + 1)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    if start + tl.program_id(0) * BLOCK_N >= stop:
        return
    rows = tl.load(rows_ptr + group * side + offs_m, mask=offs_m < side, other=-1)
    row_mask, col_mask, cols = rows >= 0, start + offs_n < stop, start + offs_n
    row_offs, col_offs = rows.to(tl.int64) * stride_xm, cols.to(tl.int64) * stride_xm
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start_d in range(0, D, BLOCK_D):
        offs_d = start_d + tl.arange(0, BLOCK_D)
        d_mask = offs_d < D
        mask = row_mask[:, None] & d_mask[None, :]
        a = tl.load(x_ptr + row_offs[:, None] + offs_d[None, :] * stride_xd, mask=mask, other=0.0)
        mask = col_mask[None, :] & d_mask[:, None]
        b = tl.load(x_ptr + col_offs[None, :] + offs_d[:, None] * stride_xd, mask=mask, other=0.0)
        if WIDEN:
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    scale = tl.load(factor_ptr + rows, mask=row_mask, other=0.0)[:, None]
    scale = scale * tl.load(factor_ptr + cols, mask=col_mask, other=0.0)[None, :]
    acc = tl.where(scale == 0, 0.0, acc * scale)
    if HAS_CHOLESKY:
        n_steps = tl.load(taken_ptr + group)
        for start_k in range(0, n_steps, BLOCK_K):
            offs_k = start_k + tl.arange(0, BLOCK_K)
            chol_offs, k_mask = offs_k.to(tl.int64) * n_rows, offs_k < n_steps
            mask = row_mask[:, None] & k_mask[None, :]
            a = tl.load(chol_ptr + chol_offs[None, :] + rows[:, None], mask=mask, other=0.0)
            mask = col_mask[None, :] & k_mask[:, None]
            b = tl.load(chol_ptr + chol_offs[:, None] + cols[None, :], mask=mask, other=0.0)
            acc -= tl.dot(a, b, input_precision="ieee")
    out_ptr += group.to(tl.int64) * side * max_length
    row_offs = offs_m.to(tl.int64)[:, None] * max_length + offs_n[None, :]
    tl.store(out_ptr + row_offs, acc, mask=row_mask[:, None] & col_mask[None, :])


class Window:
    """The rows with the largest values of every group, and their products with all rows.

    Args:
        features: `[M, D]`.
        factor: `[M]` float32 scale of each row.
        offsets, limit: `[S + 1]` offsets, and `[S]` number of rows to select.
        max_length: Length of the longest group, or more.

    Attributes:
        slots: `[M]` int32 slot of each row in its group's window, -1 outside.
        missed: `[S]` int32, set to 1 by the selection kernel after a pick outside the window.
        taken: `[S]` int32 number of rows of the Cholesky factor whose products are subtracted.
        lines: `[S, side, max_length]` float32 products.
        side: Number of rows in a window; 0 disables it, and every pick is outside.
    """

    def __init__(self, features: Tensor, factor: Tensor, offsets: Tensor, limit: Tensor, max_length: int) -> None:
        self.features, self.factor, self.offsets, self.limit = features, factor, offsets, limit
        self.max_length, groups, device = max_length, len(limit), features.device
        self.side = min(max_length, WINDOW_BYTES // (4 * max_length * groups))
        self.slots = torch.full((len(features),), -1, dtype=torch.int32, device=device)
        self.missed, self.fresh, self.taken = torch.ones(3, groups, dtype=torch.int32, device=device).unbind()
        self.rows = torch.full((groups, self.side), -1, dtype=torch.int64, device=device)
        self.lines = torch.empty(groups, self.side, max_length, device=device, dtype=torch.float32)

    def renew(self, values: Tensor, step: int, cholesky: Tensor | None = None) -> None:
        """Makes new windows before pick `step` for groups that requested one.

        Args:
            values: `[M]` float32 value of each row; minus infinity for selected rows.
            step: Index of the pick.
            cholesky: `[K, M]` float32 rows of a Cholesky factor, the first `step - 1` of which are subtracted.
        """
        if step % EVERY or self.side == 0:
            return
        groups = len(self.limit)
        _select[(groups,)](
            values, self.offsets, self.limit, self.missed, self.fresh, self.taken, self.rows, self.slots, step,
            self.side, BLOCK_N=_SCAN, num_warps=16,
        )  # fmt: skip
        half = self.features.element_size() == 2
        _products[(triton.cdiv(self.max_length, _TILE), triton.cdiv(self.side, _LINES), groups)](
            self.features, *self.features.stride(), self.factor, self.factor if cholesky is None else cholesky,
            self.offsets, self.fresh, self.taken, self.rows, self.lines, self.side, self.max_length, len(self.features),
            HAS_CHOLESKY=cholesky is not None, D=self.features.shape[1], BLOCK_D=64 if half else 32, BLOCK_M=_LINES,
            BLOCK_N=_TILE, BLOCK_K=16, num_warps=8,
        )  # fmt: skip
