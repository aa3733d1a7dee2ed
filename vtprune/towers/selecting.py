# SPDX-License-Identifier: Apache-2.0
"""One call of a vision tower up to its cut: what the selection needs is collected, and the method selects patches."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..core.lent import Lent
from ..core.options import shorten
from ..core.transfer import to_device
from ..errors import MethodError, NothingPrunedError
from ..models.attention_probe import probe
from ..report.tower import kept_numbers
from ..vision import block_calls
from ..vision.attention import Attention
from ..vision.block_calls import Offsets
from ..vision.pictures import Layout, find_pictures
from .arguments import Rows
from .copies import treats_units_alone
from .embedding import EarlyChoice, choose_from_pixels, patches_of
from .method import Patches, Rebuild, TowerChoice, TowerMethod
from .structure import TowerParts


@dataclass
class TowerCall:
    """One call of a tower.

    Attributes:
        parts: Parts of the tower.
        at: The cut is before this block.
        given: The tower's arguments by name.
        constant_rows: See `find_pictures`.
        rerun: Runs the tower without a cut, and returns the states `[N, D]` entering its first block.
        strict: Whether a share that rounds to all patches is an error.
        alone: Modules that were tried with `treats_units_alone`, and the result; kept between calls.
    """

    parts: TowerParts
    at: int
    given: dict[str, Any]
    constant_rows: Callable[[], Tensor]
    rerun: Callable[[], Tensor]
    strict: bool = True
    alone: dict[nn.Module, bool] = field(default_factory=dict)

    def treats_alone(self, module: nn.Module, states: Tensor, merge: int) -> bool:
        """Whether a module treats units of `merge` rows one by one; tried once."""
        if module not in self.alone:
            self.alone[module] = treats_units_alone(module, states, merge)
        return self.alone[module]


@dataclass(frozen=True)
class BlockCall:
    """A block and its arguments."""

    block: nn.Module
    args: tuple
    kwargs: dict[str, Any]

    def named(self) -> dict[str, Any]:
        """The arguments by name, states first."""
        return block_calls.named(self.block, self.args, self.kwargs)


@dataclass(frozen=True)
class Cut:
    """What was selected.

    Attributes:
        layout: The pictures.
        kept: Numbers of the patches of each picture that stay.
        groups: The rows that stay; empty if nothing is dropped.
        rebuild: The rule for dropped patches, if there is one.
        states: `[L, D]` or `[B, L, D]` states that the block after the cut gets.
        early: The choice made before the patch embedding, if there was one.
    """

    layout: Layout
    kept: list[Tensor]
    groups: list[Rows]
    rebuild: Rebuild | None
    states: Tensor
    early: EarlyChoice | None


class Selecting:
    """A call whose patches have not been selected yet.

    Attributes:
        early: The choice made before the patch embedding, if there was one.
        seconds: Host seconds that it took.
    """

    def __init__(self, call: TowerCall, method: TowerMethod) -> None:
        self.call, self.method = call, method
        self.early: EarlyChoice | None = None
        self.seconds = 0.0
        self._reader: Offsets | None = None
        self._offsets: Tensor | None = None  # the coarsest so far
        self._whole: BlockCall | None = None  # the last call before the cut with full attention
        self._before: Tensor | None = None  # states entering the block before the cut

    def select_by_pixels(self, module: nn.Module, pixels: Tensor) -> EarlyChoice | None:
        """Selects patches before the patch embedding `module` runs, if the method cuts before block 0 by pixels."""
        call, method = self.call, self.method
        if call.at or method.stabilize or method.reads_states() or pixels.dim() != 2:
            return None
        if not call.treats_alone(module, pixels, 1):
            return None
        started = time.perf_counter()
        choose = functools.partial(checked_choice, method)
        self.early = choose_from_pixels(module, method, call.parts, call.given, pixels, choose)
        self.seconds = time.perf_counter() - started
        return self.early

    def look(self, number: int, block_call: BlockCall, states: Tensor) -> None:
        """Keeps the offsets, calls and states of blocks up to the cut that the selection may need."""
        if self._reader is None:
            self._reader = Offsets(*batched(states).shape[:2])
        offsets = self._reader.among(block_call.named())
        coarsest = self._offsets is None or (offsets is not None and len(offsets) <= len(self._offsets))
        if offsets is not None and coarsest:
            self._offsets = offsets
        if coarsest and (number < self.call.at or self._whole is None):
            self._whole = block_call
        if number == self.call.at - 1:
            self._before = states

    def cut(self, block_call: BlockCall, states: Tensor) -> Cut:
        """Selects patches before the block of `block_call`, which gets `states`."""
        call = self.call
        layout, shared = self._pictures(block_call, states)
        if self.early is not None and not self.early.fits(layout):
            # Rare: only the block's arguments tell in which order the patches are.
            call.alone[self.early.module] = False
            self.early, states = None, call.rerun()
        choice = self._choose(layout, states) if self.early is None else self.early.choice
        keep = choice.keep.cpu()
        kept, groups = kept_numbers(keep.split(layout.offsets.diff().tolist())), []
        if not bool(keep.all()):
            assert self._reader is not None
            groups = _groups(layout, keep, shared, states.device, self._reader)
        elif call.strict and isinstance(self.method.keep, float) and self.method.keep < 1:
            raise NothingPrunedError(
                f"{type(self.method).__name__}(keep={self.method.keep}) of pictures of "
                f"{layout.unit_offsets.diff().tolist()} merge groups rounds to all of them, so no patch would be "
                "dropped; use a smaller share, or a number"
            )
        return Cut(layout, kept, groups, choice.rebuild, states, self.early)

    def _pictures(self, block_call: BlockCall, states: Tensor) -> tuple[Layout, bool]:
        """The pictures among the states at the cut, and whether entries of the batch have some table in common."""
        call, shape, values = self.call, batched(states).shape, block_call.named()
        mask = block_calls.mask_among(values)
        tables = block_calls.tables_among({k: v for k, v in values.items() if v is not states}, shape[1])
        shared = shape[0] > 1 and any(len(table) != shape[0] for table in tables)
        size, group = (shape[0], shape[1]), self.method.group
        layout = find_pictures(call.parts, call.given, size, self._offsets, mask, call.constant_rows, group, tables)
        return layout, shared

    @torch.no_grad()
    def _choose(self, layout: Layout, states: Tensor) -> TowerChoice:
        before = None if self._before is None else _of_patches(layout, self._before)
        received = functools.partial(self._received, layout)
        patches = patches_of(layout, self.method, _of_patches(layout, states), before, received)
        return checked_choice(self.method, patches)

    def _received(self, layout: Layout) -> Tensor:
        """Mean attention `[N]` that patches receive, in large pictures over a sample of query rows."""
        call, reader = self._whole, self._reader
        assert call is not None and reader is not None
        values = call.named()
        states = values.pop(next(iter(values)))
        full, mask = batched(states), block_calls.mask_among(values)
        for name, value in values.items():
            if reader.read(value) is not None:
                values[name] = value.new_tensor([0, full.shape[1]])
        values.update({name: full.shape[1] for name, v in values.items() if "max" in name and isinstance(v, int)})
        read = probe(call.block, (states,), values)
        valid = None
        if layout.batch > 1 and mask is not None:
            valid = torch.zeros(layout.batch * layout.length, dtype=torch.bool)
            valid[layout.rows] = True
            valid = (valid.reshape(layout.batch, -1) | layout.fixed).to(full.device)
        segments = layout.offsets.to(full.device) if layout.batch == 1 and not layout.fixed.any() else None
        if segments is not None and segments[-1] != layout.length:
            segments = None
        attention = Attention(read.query, read.key, read.scaling, segments, valid, 0)
        return attention.received(attention.sampled("auto")).flatten()[to_device(layout.rows, full.device)]


def checked_choice(method: TowerMethod, patches: Patches) -> TowerChoice:
    """The method's choice; raises unless it has all patches, whole units, and as many as the budget."""
    lent, name = Lent(), type(method).__name__
    lent.add("patches.states", patches.states)
    lent.add("patches.before", patches.before)
    choice = method.choose(patches)
    lent.check(name)
    if not isinstance(choice, TowerChoice) or not isinstance(choice.keep, Tensor):
        raise MethodError(f"{name}.choose returned {shorten(choice)}; expected a vtprune.towers.TowerChoice")
    keep = choice.keep.cpu()
    if keep.shape != (len(patches),) or keep.dtype != torch.bool:
        raise MethodError(
            f"{name} returned {keep.dtype} of shape {tuple(keep.shape)}; expected bool of [{len(patches)}]"
        )
    units = torch.zeros(int(patches.unit_offsets[-1]), dtype=torch.int64)
    units.index_add_(0, patches.unit.cpu(), keep.long())
    sizes = torch.bincount(patches.unit.cpu(), minlength=len(units))
    if bool(((units != 0) & (units != sizes)).any()):
        raise MethodError(f"{name} kept part of a merge group; expected whole groups (or group=False)")
    counts = torch.stack([part.sum() for part in (units > 0).split(patches.unit_offsets.diff().tolist())])
    if patches.budgets is not None and not torch.equal(counts, patches.budgets):
        raise MethodError(
            f"{name} kept {counts.tolist()} merge groups of the pictures; the budget is {patches.budgets.tolist()}"
        )
    if bool((counts == 0).any()):
        raise MethodError(f"{name} kept no patch of a picture; expected at least one of each")
    return choice


def batched(states: Tensor) -> Tensor:
    """States `[B, L, D]` from these or from `[L, D]`."""
    return states[None] if states.dim() == 2 else states


def _of_patches(layout: Layout, states: Tensor) -> Tensor:
    """States `[N, D]` of the patches, without those of class tokens and padding."""
    flat = states.detach().reshape(-1, states.shape[-1])
    return flat if len(layout.rows) == len(flat) else flat[to_device(layout.rows, flat.device)]


def _groups(layout: Layout, keep: Tensor, shared: bool, device: torch.device, offsets: Offsets) -> list[Rows]:
    """Groups of rows that run in one call of a block: entries of the batch that keep the same number of rows."""
    stays = layout.fixed.clone()
    stays.view(-1)[layout.rows[keep]] = True
    counts = stays.sum(1)
    labels = torch.arange(layout.batch) if shared else counts
    groups = []
    for label in labels.unique().tolist():
        entries = (labels == label).nonzero()[:, 0]
        index = stays[entries].nonzero()[:, 1].reshape(len(entries), -1)
        entries, index = to_device(entries, device), to_device(index, device)
        groups.append(Rows(layout.batch, layout.length, entries, index, offsets))
    return groups
