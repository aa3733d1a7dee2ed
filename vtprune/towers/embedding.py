# SPDX-License-Identifier: Apache-2.0
"""The patch embedding of a tower that is cut before its first block, by pixels alone: it runs on kept patches only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.transfer import to_device
from ..errors import MethodError
from ..vision.block_calls import Offsets
from ..vision.patch_sizes import PatchSizes
from ..vision.pictures import Layout, find_pictures
from .arguments import Rows
from .copies import Copies
from .method import Patches, TowerChoice, TowerMethod


@dataclass
class EarlyChoice:
    """A choice of patches that was made from the pixels of a packed sequence, before the patch embedding.

    Attributes:
        module: The patch embedding.
        layout: Pictures of the sequence, as they are known before the first block.
        choice: Patches that stay; the others are copies.
        ran: `[K]` rows of the pixels that are embedded.
        copies: `[N]` for each row of the pixels, the number of its embedding among these.
    """

    module: nn.Module
    layout: Layout
    choice: TowerChoice
    ran: Tensor
    copies: Tensor

    def fits(self, layout: Layout) -> bool:
        """Whether the first block's arguments give the same pictures, with the same order of patches."""
        mine, others = self.layout.grids, layout.grids
        same_shape = (layout.batch, layout.length, len(others)) == (1, self.layout.length, len(mine))
        return same_shape and all(
            a is not None and b is not None and a.merge == b.merge and torch.equal(a.place, b.place)
            for a, b in zip(mine, others, strict=True)
        )


@torch.no_grad()
def choose_from_pixels(
    module: nn.Module,
    method: TowerMethod,
    parts: PatchSizes,
    given: dict[str, Any],
    pixels: Tensor,
    choose: Callable[[Patches], TowerChoice],
) -> EarlyChoice | None:
    """Selects patches before the patch embedding; None if some are no copies, or the pictures are not known yet.

    Args:
        module: The patch embedding.
        method: A method that reads pixels only.
        parts: Sizes of the tower.
        given: The tower's arguments by name.
        pixels: `[N, F]` pixels of a packed sequence, one of the arguments.
        choose: Selects patches and checks the selection.
    """
    length = len(pixels)
    layout = find_pictures(parts, given, (1, length), None, None, _no_rows, method.group)
    if any(grid is None for grid in layout.grids) or int(layout.offsets[-1]) != length:
        return None
    choice = choose(patches_of(layout, method, pixels.new_empty(length, 0), None, _no_rows))
    keep = choice.keep.cpu()
    if choice.rebuild is None or bool(keep.all()):
        return None
    ran = keep.nonzero()[:, 0]
    rows = Rows(1, length, torch.zeros(1, dtype=torch.int64), ran[None], Offsets(1, length))
    copies = Copies.of(choice.rebuild, layout.rows, [rows], 1)
    if copies is None:
        return None
    order = torch.arange(length) if layout.order is None else layout.order
    by_pixels = torch.empty_like(order).index_copy_(0, order, copies.rows)
    return EarlyChoice(
        module, layout, choice, to_device(order[ran], pixels.device), to_device(by_pixels, pixels.device)
    )


def patches_of(
    layout: Layout, method: TowerMethod, states: Tensor, before: Tensor | None, received: Callable[[], Tensor]
) -> Patches:
    """What a method is told about the patches of a call.

    Args:
        layout: The pictures.
        method: The method.
        states, before: `[N, D]` states of the patches.
        received: See `Patches`.
    """
    return Patches(
        states=states,
        before=before,
        offsets=layout.offsets,
        unit=to_device(layout.unit, states.device),
        unit_offsets=layout.unit_offsets,
        budgets=method.budgets(layout.unit_offsets.diff()),
        grids=layout.grids,
        pixels=layout.pixels,
        received=received,
    )


def _no_rows() -> Tensor:
    raise MethodError(
        "this tower method sets needs_states = False, but it reads attention, which does not exist before the patch "
        "embedding; remove needs_states = False, or select by pixels and grids only"
    )
