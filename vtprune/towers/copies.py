# SPDX-License-Identifier: Apache-2.0
"""Dropped patches that are copies of kept ones: their states are gathered once, and mergers run on the kept ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.transfer import to_device
from .arguments import Rows
from .method import Rebuild
from .structure import TowerParts

_TRIED = 4  # units of the first call that tell whether a merger treats each unit by itself


@dataclass
class Copies:
    """For each row of a packed sequence, the row that ran and that it is a copy of (itself if it ran).

    Attributes:
        rows: `[L]` numbers among the rows that ran.
        units: `[L / m]` the same for merge groups of m consecutive rows; None unless they are copied as a whole.
        merge: Rows `m` of a merge group.
    """

    rows: Tensor
    units: Tensor | None
    merge: int

    @classmethod
    def of(cls, rebuild: Rebuild, patches: Tensor, groups: list[Rows], merge: int) -> Copies | None:
        """The copies that `rebuild` describes; None if some rows are not copies, or the tower's call is a batch.

        Args:
            rebuild: The rule for dropped patches.
            patches: `[N]` rows of the patches, on the host.
            groups: The rows that run.
            merge: Rows of a merge group.
        """
        if rebuild.residual or rebuild.sources.shape[1] != 1 or len(groups) != 1 or groups[0].batch != 1:
            return None
        ran, length = groups[0].index[0].cpu(), groups[0].length
        rows = torch.full((length,), -1)
        rows[ran] = torch.arange(len(ran))
        rows[patches[rebuild.dropped.cpu()]] = rows[patches[rebuild.sources[:, 0].cpu()]]
        if bool((rows < 0).any()):
            return None
        units = None
        if length % merge == 0 and len(ran) % merge == 0:
            by_unit = rows.reshape(-1, merge)
            first = by_unit[:, :1]
            if bool((first % merge == 0).all()) and torch.equal(by_unit, first + torch.arange(merge)):
                units = to_device(first[:, 0] // merge, groups[0].index.device)
        return cls(to_device(rows, groups[0].index.device), units, merge)

    def spread(self, ran: Tensor) -> Tensor:
        """States `[1, L, D]` of all rows, from those that ran: `[1, K, D]`."""
        return ran.index_select(1, self.rows)


def row_by_row(parts: TowerParts) -> Iterator[nn.Module]:
    """The modules of a tower, outside its blocks, that may compute one row from each patch or merge group.

    They have linear layers or convolutions, and are no lists.
    """

    def search(module: nn.Module) -> Iterator[nn.Module]:
        for child in module.children():
            if child is parts.blocks:
                continue
            inside = list(child.modules())
            if isinstance(child, nn.ModuleList) or parts.blocks in inside:
                yield from search(child)
            elif any(isinstance(m, (nn.Linear, nn.Conv2d, nn.Conv3d)) for m in inside):
                yield child

    yield from search(parts.tower)


@torch.no_grad()
def treats_units_alone(module: nn.Module, states: Tensor, merge: int) -> bool:
    """Whether a module computes one row from each `merge` rows, whatever the others are.

    The module is run on the first units of `states` `[L, D]` and on some of them in reverse order: both must give the
    same row for the same unit.
    """
    count = min(_TRIED, len(states) // merge)
    units = states[: count * merge].detach().reshape(count, merge, -1)
    # Equal units (plain paper) would tell nothing.
    differences = torch.linspace(-1, 1, units.numel(), device=units.device, dtype=torch.float32)
    units = units + differences.reshape(units.shape).to(units.dtype)
    try:
        straight, turned = (module.forward(x.flatten(0, 1)) for x in (units, units.flip(0)[:-1]))
    except Exception:  # a module that counts on all patches of a picture
        return False
    if not isinstance(straight, Tensor) or len(straight) != count or len(turned) != count - 1:
        return False
    exact = torch.finfo(straight.dtype).eps * 64
    return bool(torch.allclose(straight.flip(0)[:-1].float(), turned.float(), rtol=exact, atol=exact))
