# SPDX-License-Identifier: Apache-2.0
"""One call of a vision tower: selects patches at the cut, and runs the later blocks on the rows that are left.

Seen from outside, every block still takes and returns the full sequence, so class tokens, feature layers, DeepStack
taps, mergers and projectors see the usual shapes.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..core.lent import Lent
from ..core.options import shorten
from ..core.transfer import to_device
from ..errors import MethodError, NothingPrunedError, UnsupportedModelError
from ..models.attention_probe import probe
from ..report.tower import BlockWork, TowerRun, kept_numbers, weights_per_token
from ..vision import block_calls
from ..vision.attention import Attention
from ..vision.block_calls import Offsets
from ..vision.pictures import Layout, find_pictures
from . import arguments
from .arguments import Rows
from .copies import Copies, treats_units_alone
from .embedding import EarlyChoice, choose_from_pixels, patches_of
from .method import Patches, Rebuild, TowerChoice, TowerMethod
from .structure import TowerParts


@dataclass
class BlockCall:
    """A block and its arguments."""

    block: nn.Module
    args: tuple
    kwargs: dict[str, Any]


@dataclass
class RunningTower:
    """State of one call of the tower.

    Attributes:
        parts: Parts of the tower.
        method: Method that selects patches; None only counts the tower's work.
        at: The cut is before this block.
        given: The tower's arguments by name.
        constant_rows: See `find_pictures`.
        rerun: Runs the tower without a cut, and returns the states `[N, D]` entering its first block.
        strict: Whether a share that rounds to all patches is an error.
    """

    parts: TowerParts
    method: TowerMethod | None
    at: int
    given: dict[str, Any]
    constant_rows: Callable[[], Tensor]
    rerun: Callable[[], Tensor]
    strict: bool = True
    alone: dict[nn.Module, bool] = field(default_factory=dict)  # see `treats_units_alone`, kept between calls
    early: EarlyChoice | None = None  # made before the patch embedding
    groups: list[Rows] = field(default_factory=list)  # empty if nothing is dropped
    choice: TowerChoice | None = None
    layout: Layout | None = None
    before: Tensor | None = None  # states entering the block before the cut
    at_cut: Tensor | None = None  # [B, L, D] states at the cut
    kept: list[Tensor] | None = None  # of each picture
    rebuilt: _Rebuilt | None = None
    copies: Copies | None = None  # instead, where dropped patches are copies
    selection_time: float = 0.0

    def __post_init__(self) -> None:
        self.work: list[BlockWork] = []
        self._reader: Offsets | None = None
        self._offsets: Tensor | None = None  # the coarsest so far
        self._whole: BlockCall | None = None  # the last call before the cut with full attention
        self._pending: tuple[tuple, dict[str, Any], Tensor] | None = None
        self.uncut: tuple[tuple, dict[str, Any]] | None = None  # arguments of the block in progress, if they were cut
        self._written: tuple[Tensor, int, Tensor] | None = None  # states that a block returned, and their rows that ran
        self._output: Tensor | None = None  # full states after the last block so far, if merge groups are copied
        self._spared = 0.0  # multiply-adds that mergers and the patch embedding did not do
        self._shared = False  # whether the entries of a batch have some table in common
        self._recorded: TowerRun | None = None

    def before_block(self, number: int, block: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Selects patches at the cut, and cuts the arguments of the blocks after it."""
        states, method, self.uncut = block_calls.states_of(args, kwargs), self.method, None
        if method is None:
            self._count(number, states, args, kwargs, [])
            return None
        if states is None or states.dim() not in (2, 3):
            shape = None if states is None else tuple(states.shape)
            raise UnsupportedModelError(
                f"the vision tower {type(self.parts.tower).__name__} cannot be cut: its blocks take states of shape "
                f"{shape}; expected one sequence of tokens, [N, D] or [B, N, D]; patch without tower="
            )
        if self._reader is None:
            self._reader = Offsets(*_batched(states).shape[:2])
        if number <= self.at:
            self._look(number, BlockCall(block, args, kwargs))
        redone = False
        if number == self.at:
            started = time.perf_counter()
            layout = self._pictures(method, block, args, kwargs, states)
            if self.early is not None and not self.early.fits(layout):
                # Rare: only the block's arguments tell in which order the patches are.
                self.alone[self.early.module] = False
                self.early, self._spared, states, redone = None, 0.0, self.rerun(), True
                args, kwargs = arguments.with_states(args, kwargs, states)
            self._cut(method, layout, states)
            self._prepare_rebuilding(states)
            self.selection_time += time.perf_counter() - started
        groups = self.groups if number >= self.at + method.stabilize else []
        self._count(number, states, args, kwargs, groups)
        if not groups:
            return (args, kwargs) if redone else None
        full = _batched(states)
        self._pending, self.uncut = (args, kwargs, full), (args, kwargs)
        return self._arguments_of(self.groups[0], args, kwargs, full, states.dim() == 2)

    def after_block(self, number: int, block: nn.Module, output: Any) -> Any:
        """Writes the rows that ran into the full states, and rebuilds the others."""
        if self.method is None or not self.groups or number < self.at:
            return None
        rows = output[0] if isinstance(output, tuple) else output
        if self.copies is not None:
            self._pending = None
            base = self.copies.spread(_batched(rows))
        elif number < self.at + self.method.stabilize:
            full = _batched(rows)  # all rows ran; dropped ones are rebuilt nevertheless
            base = self._held(full)
        else:
            assert self._pending is not None
            args, kwargs, full = self._pending
            self._pending = None
            base = self.groups[0].put(full, _batched(rows))
            for group in self.groups[1:]:
                new_args, new_kwargs = self._arguments_of(group, args, kwargs, full, rows.dim() == 2)
                out = block.forward(*new_args, **new_kwargs)
                base = group.put(base, _batched(out[0] if isinstance(out, tuple) else out))
        if self.rebuilt is not None:
            base = self.rebuilt.apply(base)
        whole = base[0] if rows.dim() == 2 else base
        if self.copies is not None and self.copies.units is not None:
            self._output = whole
        if number >= self.at + self.method.stabilize and not whole.is_inference():
            self._written = (whole, whole._version, rows)
        return (whole, *output[1:]) if isinstance(output, tuple) else whole

    def before_embedding(self, module: nn.Module, pixels: Tensor) -> Tensor | None:
        """The pixels of the patches that stay, if the method selects them by pixels before block 0; else None."""
        method = self.method
        if method is None or self.at or method.stabilize or method.reads_states() or pixels.dim() != 2:
            return None
        if module not in self.alone:
            self.alone[module] = treats_units_alone(module, pixels, 1)
        if not self.alone[module]:
            return None
        started = time.perf_counter()
        self.early = choose_from_pixels(module, method, self.parts, self.given, pixels, self._choose)
        self.selection_time += time.perf_counter() - started
        if self.early is None:
            return None
        self._spared += (len(pixels) - len(self.early.ran)) * self.parts.embedding_weights
        return pixels.index_select(0, self.early.ran)

    def after_embedding(self, output: Tensor) -> Tensor:
        """The embeddings of all patches; a dropped one has that of the patch that it is a copy of."""
        assert self.early is not None
        return output.index_select(0, self.early.copies)

    def before_merger(self, module: nn.Module, states: Any) -> Tensor | None:
        """The states of the merge groups that ran, for a merger of the last block's output; None leaves it all rows."""
        copies = self.copies
        if copies is None or copies.units is None or self._output is None:
            return None
        if states is not self._output or self._output.dim() != 2:
            return None
        if module not in self.alone:
            self.alone[module] = treats_units_alone(module, self._output, copies.merge)
        if not self.alone[module]:
            return None
        ran = self.groups[0].index[0]
        self._spared += (len(self._output) - len(ran)) // copies.merge * weights_per_token(module)
        if self._recorded is not None:
            self._recorded.spared = self._spared
        return self._output.index_select(0, ran)

    def after_merger(self, output: Tensor) -> Tensor:
        """The merger's output for all merge groups."""
        assert self.copies is not None and self.copies.units is not None
        return output.index_select(0, self.copies.units)

    def _prepare_rebuilding(self, states: Tensor) -> None:
        if self.choice is None or self.choice.rebuild is None or self.layout is None:
            return
        assert self.method is not None
        if not self.method.stabilize:
            self.copies = Copies.of(self.choice.rebuild, self.layout.rows, self.groups, self.parts.packed_merge**2)
        if self.copies is None:
            self.rebuilt = _Rebuilt.of(self.choice.rebuild, self.layout.rows, _batched(states))

    def _look(self, number: int, call: BlockCall) -> None:
        """Keeps the offsets, calls and states of blocks before the cut that the selection may need."""
        assert self._reader is not None
        offsets = self._reader.among(block_calls.named(call.block, call.args, call.kwargs))
        coarsest = self._offsets is None or (offsets is not None and len(offsets) <= len(self._offsets))
        if offsets is not None and coarsest:
            self._offsets = offsets
        if coarsest and (number < self.at or self._whole is None):
            self._whole = call
        if number == self.at - 1:
            self.before = block_calls.states_of(call.args, call.kwargs)

    def _pictures(self, method: TowerMethod, block: nn.Module, args: tuple, kwargs: dict, states: Tensor) -> Layout:
        """The pictures among the states at the cut."""
        shape = _batched(states).shape
        values = block_calls.named(block, args, kwargs)
        mask = block_calls.mask_among(values)
        tables = block_calls.tables_among({k: v for k, v in values.items() if v is not states}, shape[1])
        self._shared = shape[0] > 1 and any(len(table) != shape[0] for table in tables)
        return find_pictures(
            self.parts, self.given, (shape[0], shape[1]), self._offsets, mask, self.constant_rows, method.group, tables
        )

    @torch.no_grad()
    def _cut(self, method: TowerMethod, layout: Layout, states: Tensor) -> None:
        full, self.layout = _batched(states), layout
        if self.early is not None:
            choice = self.early.choice
        else:
            before = None if self.before is None else _of_patches(layout, self.before)
            received = functools.partial(self._received, layout)
            choice = self._choose(patches_of(layout, method, _of_patches(layout, full), before, received))
        keep = choice.keep.cpu()
        self.before = self._whole = None
        self.kept = kept_numbers(keep.split(layout.offsets.diff().tolist()))
        if bool(keep.all()):
            if self.strict and isinstance(method.keep, float) and method.keep < 1:
                raise NothingPrunedError(
                    f"{type(method).__name__}(keep={method.keep}) of pictures of {layout.unit_offsets.diff().tolist()} "
                    "merge groups rounds to all of them, so no patch would be dropped; use a smaller share, or a number"
                )
            return
        self.choice = choice
        assert self._reader is not None
        self.groups = _groups(layout, keep, self._shared, full.device, self._reader)
        self.at_cut = full

    def _choose(self, patches: Patches) -> TowerChoice:
        """The method's choice; raises unless it has all patches, whole units, and as many as the budget."""
        assert self.method is not None
        lent, name = Lent(), type(self.method).__name__
        lent.add("patches.states", patches.states)
        lent.add("patches.before", patches.before)
        choice = self.method.choose(patches)
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

    def _received(self, layout: Layout) -> Tensor:
        """Mean attention `[N]` that patches receive, in large pictures over a sample of query rows."""
        call = self._whole
        assert call is not None
        values = block_calls.named(call.block, call.args, call.kwargs)
        states = values.pop(next(iter(values)))
        full, mask = _batched(states), block_calls.mask_among(values)
        assert self._reader is not None
        for name, value in values.items():
            if self._reader.read(value) is not None:
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

    def _arguments_of(
        self, group: Rows, args: tuple, kwargs: dict, full: Tensor, flat: bool
    ) -> tuple[tuple, dict[str, Any]]:
        written, rows = self._written, None
        if written is not None and block_calls.states_of(args, kwargs) is written[0] and len(self.groups) == 1:
            rows = written[2] if written[0]._version == written[1] else None
        if rows is None:
            rows = group.take(full, 1, True)
            rows = rows[0] if flat else rows
        return arguments.cut(args, kwargs, group, rows)

    def _held(self, full: Tensor) -> Tensor:
        """The states `full` at kept rows, and the states at the cut at all others."""
        assert self.at_cut is not None
        base = self.at_cut
        for group in self.groups:
            base = group.put(base, group.take(full, 1, True))
        return base

    def _count(self, number: int, states: Tensor | None, args: tuple, kwargs: dict, groups: list[Rows]) -> None:
        """Records the work of a block."""
        if states is None:
            return
        width = states.shape[-1]
        batch, length = (1, len(states)) if states.dim() == 2 else (len(states), math.prod(states.shape[1:-1]))
        candidates = [
            v
            for v in (*args[1:], *kwargs.values())
            if isinstance(v, Tensor) and v.dim() == 1 and not v.is_floating_point() and v.dtype != torch.bool
        ]
        work = BlockWork(self.parts.weights[number], width, batch, length, candidates, batch * length)
        if groups:
            work.tokens_after = sum(group.index.numel() for group in groups)
            offsets = self._reader.among(dict(enumerate(candidates))) if self._reader is not None else None
            if offsets is None and batch == 1 and self.layout is not None and not self.layout.fixed.any():
                offsets = self.layout.offsets
                work.candidates = [offsets]
            if offsets is None:
                work.pairs_after = sum(group.index.numel() * group.index.shape[1] for group in groups)
            else:
                work.pairs_after = int(arguments.cut_offsets(offsets, groups[0]).diff().square().sum())
        self.work.append(work)

    def record(self) -> TowerRun | None:
        """The record of this call; None if it ended before the cut."""
        if self.method is None:
            tokens = self.work[0].batch * self.work[0].length if self.work else 0
            return TowerRun("", len(self.parts.blocks), [], [], self.work, self._outside(tokens))
        if self.kept is None or self.layout is None:
            return None
        patches = self.layout.offsets.diff().tolist()
        name = type(self.method).__name__
        outside = self._outside(sum(patches))
        self._recorded = TowerRun(
            name, self.at, self.kept, patches, self.work, outside, self._spared, self.selection_time
        )
        return self._recorded

    def _outside(self, patches: int) -> float:
        """Multiply-adds of patch embedding and merger."""
        return patches * (self.parts.embedding_weights + self.parts.merger_weights / self.parts.merge**2)


@dataclass
class _Rebuilt:
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
    def of(cls, rebuild: Rebuild, rows: Tensor, full: Tensor) -> _Rebuilt:
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


def _of_patches(layout: Layout, states: Tensor) -> Tensor:
    """States `[N, D]` of the patches, without those of class tokens and padding."""
    flat = states.detach().reshape(-1, states.shape[-1])
    return flat if len(layout.rows) == len(flat) else flat[to_device(layout.rows, flat.device)]


def _batched(states: Tensor) -> Tensor:
    return states[None] if states.dim() == 2 else states


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
