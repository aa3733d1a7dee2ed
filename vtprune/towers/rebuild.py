# SPDX-License-Identifier: Apache-2.0
"""Dropped patches whose states are rebuilt from those of kept ones after every block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.transfer import to_device
from .method import Rebuild


@dataclass
class Rebuilt:
    """`Rebuild` in terms of rows of the flat states.

    Attributes:
        dropped: `[R]` rows that are rebuilt.
        used: `[K]` rows that they are rebuilt from.
        sources: `[R, k]` numbers in `used`; `len(used)` for fewer than k sources.
        own: `[R, D]` states of the dropped rows at the cut, None if they are copies.
        base: `[K, D]` states of `used` at the cut, None if they are copied.
    """

    dropped: Tensor
    used: Tensor
    sources: Tensor
    own: Tensor | None
    base: Tensor | None

    @classmethod
    def of(cls, rebuild: Rebuild, rows: Tensor, full: Tensor) -> Rebuilt:
        """The rows of a call.

        Args:
            rebuild: The rule for dropped patches.
            rows: `[N]` rows of the patches.
            full: `[B, L, D]` states at the cut.
        """
        rows = to_device(rows, full.device)
        sources = rebuild.sources.to(rows.device)
        used, place = torch.unique(sources, return_inverse=True)
        if len(used) and int(used[0]) < 0:  # -1 stands for no source
            used, place = used[1:], torch.where(sources < 0, len(used) - 1, place - 1)
        dropped, used = rows[rebuild.dropped.to(rows.device)], rows[used]
        flat = full.flatten(0, 1)
        own = flat[dropped] if rebuild.residual else None
        return cls(dropped, used, place, own, flat[used] if rebuild.residual else None)

    def apply(self, full: Tensor) -> Tensor:
        """States `[B, L, D]`, changed in place: the dropped rows are rebuilt from the kept ones."""
        flat = full.flatten(0, 1)
        now = flat[self.used]
        if self.base is not None:
            now = now - self.base
        now = torch.cat([now, now.new_zeros(1, now.shape[1])])
        made = nn.functional.embedding_bag(self.sources, now, mode="mean", padding_idx=len(now) - 1)
        made = made if self.own is None else self.own + made
        return flat.index_copy_(0, self.dropped, made.to(flat.dtype)).reshape(full.shape)
