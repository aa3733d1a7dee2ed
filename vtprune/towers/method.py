# SPDX-License-Identifier: Apache-2.0
"""The contract of a tower method: the block before which it cuts, the patches it keeps, and states for the others.

A tower method never sees a model. It gets `Patches`, the patches of every picture of one tower call laid out flat, and
returns a `TowerChoice`. Class tokens, padding, windows and budgets are handled by `selecting` and `running`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core.method import check_scores
from ..core.options import Count, check_options, fits, shorten
from ..core.ragged import group_ids, top_k
from ..errors import BudgetError, MethodError
from ..vision.pictures import Grid


@dataclass
class Rebuild:
    """How states of dropped patches are computed from those of kept ones after every block.

    Attributes:
        dropped: `[R]` numbers of the patches that are rebuilt, ascending.
        sources: `[R, k]` numbers of the kept patches that each is rebuilt from; -1 for fewer than k.
        residual: True adds the mean change of the sources since the cut to the patch's own state at the cut; False
            copies the mean of the sources.
    """

    dropped: Tensor
    sources: Tensor
    residual: bool


@dataclass
class TowerChoice:
    """The patches that a tower method keeps.

    Attributes:
        keep: `[N]` bool, the patches that go through the later blocks.
        rebuild: States of the others after the cut; None keeps them at their states at the cut.
    """

    keep: Tensor
    rebuild: Rebuild | None = None


@dataclass
class Patches:
    """The patches of all pictures of one tower call at the cut, flat; class tokens and padding are left out.

    A unit is kept or dropped as a whole: the patches that the projector merges into one token, or a single patch.

    Attributes:
        states: `[N, D]` states entering the block at the cut.
        before: `[N, D]` states entering the block before it, None at block 0.
        offsets: `[S + 1]` int64 offsets of the pictures, on the host.
        unit: `[N]` int64 unit of each patch; units count through the pictures in order, on the device of `states`.
        unit_offsets: `[S + 1]` offsets of the pictures in units, on the host.
        budgets: `[S]` number of units to keep of each picture, on the host; None if the method has no budget.
        grids: For each picture, the places of its patches, or None if they are unknown.
        pixels: Returns the pixels `[N, F]` of each patch, float32, as the processor normalized them; one of several
            temporal copies if they are equal in all patches.
        received: Returns `[N]` float32, the mean attention that each patch receives from its picture in the last block
            with full attention before the cut (in the block at the cut if there is none). Pictures of 2,048 patches or
            more are read at 512 query rows, spread evenly.
    """

    states: Tensor
    before: Tensor | None
    offsets: Tensor
    unit: Tensor
    unit_offsets: Tensor
    budgets: Tensor | None
    grids: list[Grid | None]
    pixels: Callable[[], Tensor]
    received: Callable[[], Tensor]

    def __len__(self) -> int:
        return len(self.unit)

    def per_unit(self, values: Tensor) -> Tensor:
        """Means over the patches of each unit: `[N, ...]` -> `[U, ...]`, float32."""
        units, values = int(self.unit_offsets[-1]), values.float()
        if units == len(self):
            return torch.empty_like(values).index_copy_(0, self.unit, values)
        total = values.new_zeros(units, *values.shape[1:]).index_add_(0, self.unit, values)
        count = torch.bincount(self.unit, minlength=units).to(total.dtype)
        return total / count.reshape(-1, *[1] * (total.dim() - 1))

    def largest(self, scores: Tensor) -> Tensor:
        """Keep mask `[N]` of the units with the largest mean scores; ties go to the smaller unit.

        Args:
            scores: `[N]` of patches or `[U]` of units.
        """
        assert self.budgets is not None
        count = len(self) if isinstance(scores, Tensor) and len(scores) == len(self) else int(self.unit_offsets[-1])
        check_scores(scores, (count,), "score")
        if bool(scores.isnan().any()):
            raise MethodError("score returned NaN; expected numbers (infinite ones keep or drop a patch)")
        scores = scores.float() if len(scores) == int(self.unit_offsets[-1]) else self.per_unit(scores)
        offsets = self.unit_offsets.to(scores.device)
        return top_k(scores, offsets, self.budgets.to(scores.device))[self.unit]

    def picture(self) -> Tensor:
        """Number `[N]` of each patch's picture, on the device of `states`."""
        return group_ids(self.offsets.to(self.states.device), len(self))


@dataclass
class TowerMethod:
    """Base of all tower methods.

    Attributes:
        keep: Share of the units of every picture that stays, in (0, 1], or a number of units.
        block: The cut is before this block (0-based); None is after a quarter of the blocks.
        group: Whether the patches that the projector merges into one token are kept or dropped together.
    """

    keep: float | int | None = 0.35
    block: Count | None = None
    group: bool = True

    needs_budget: ClassVar[bool] = True
    needs_states: ClassVar[bool] = True  # False: `choose` reads pixels and places only
    first_block: ClassVar[int] = 0  # the earliest block before which the method can cut
    stabilize: ClassVar[int] = 0  # blocks after the cut that still run on all patches

    def __post_init__(self) -> None:
        check_options(self)
        if self.keep is None and not self.needs_budget:
            return
        keep: Any = self.keep
        if fits(keep, int) and keep >= 1:
            self.keep = int(keep)
        elif fits(keep, float) and 0 < keep <= 1:
            self.keep = float(keep)
        else:
            raise BudgetError(
                f"{type(self).__name__}: keep is {shorten(keep)}; expected a share of the patches in (0, 1] such as "
                "0.35, or an int of 1 or more, the number of merge groups per picture"
            )

    def block_of(self, count: int) -> int:
        """The block before which the method cuts a tower of `count` blocks.

        Raises:
            BudgetError: The tower has no such block.
        """
        block = max(count // 4, self.first_block) if self.block is None else self.block
        if not self.first_block <= block < count:
            raise BudgetError(
                f"{type(self).__name__}: block is {block!r}; this vision tower has {count} blocks, expected a number "
                f"from {self.first_block} to {count - 1}"
            )
        return block

    def budgets(self, units: Tensor) -> Tensor | None:
        """Number `[S]` of units to keep of each picture, from its number of units `[S]`; None without a budget."""
        if self.keep is None:
            return None
        if isinstance(self.keep, float):
            return torch.tensor([max(1, round(self.keep * n)) for n in units.tolist()])
        return units.clamp(max=min(self.keep, int(units.max()))) if len(units) else units

    @classmethod
    def reads_states(cls) -> bool:
        """Whether `choose` may read states.

        `needs_states = False` counts only in the class that also defines `choose`: a subclass that overrides `choose`
        sets it again.
        """
        owner = next(base for base in cls.__mro__ if "choose" in vars(base))
        return vars(owner).get("needs_states", True)

    def choose(self, patches: Patches) -> TowerChoice:
        """Selects the patches that stay, and how the others are rebuilt."""
        return TowerChoice(patches.largest(self.score(patches)))

    def score(self, patches: Patches) -> Tensor:
        """Scores `[N]` of patches or `[U]` of units; larger ones stay."""
        raise MethodError(f"{type(self).__name__} defines neither score nor choose; a tower method needs one of them")
