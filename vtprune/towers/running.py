# SPDX-License-Identifier: Apache-2.0
"""One call of a vision tower after its cut: blocks run on the rows that are left, and the others are rebuilt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..report.tower import BlockWork, weights_per_token
from . import arguments
from .arguments import Rows
from .copies import Copies
from .rebuild import Rebuilt
from .selecting import Cut, TowerCall, batched


@dataclass
class _Written:
    """States that a block returned.

    Attributes:
        full: The states of all rows.
        version: Torch's count of changes in place.
        rows: Those of the rows that ran.
    """

    full: Tensor
    version: int
    rows: Tensor


class Running:
    """A call whose patches were selected.

    Attributes:
        call: Facts of the call.
        cut: What was selected.
        spared: Multiply-adds that the patch embedding and mergers did not do.

    Args:
        stabilize: Blocks after the cut that still run on all rows.
    """

    def __init__(self, call: TowerCall, cut: Cut, stabilize: int) -> None:
        self.call, self.cut, self.spared = call, cut, 0.0
        if cut.early is not None:
            self.spared = float((len(cut.early.copies) - len(cut.early.ran)) * call.parts.embedding_weights)
        self._start = call.at + stabilize  # the first block that runs on the rows that are left
        self._copies: Copies | None = None
        self._rebuilt: Rebuilt | None = None
        if cut.groups and cut.rebuild is not None:
            if not stabilize:
                self._copies = Copies.of(cut.rebuild, cut.layout.rows, cut.groups, call.parts.packed_merge**2)
            if self._copies is None:
                self._rebuilt = Rebuilt.of(cut.rebuild, cut.layout.rows, batched(cut.states))
        self._uncut: tuple[tuple, dict[str, Any], Tensor] | None = None  # of the block in progress, and its states
        self._written: _Written | None = None
        self._output: Tensor | None = None  # full states after the last block so far, if merge groups are copied

    def shortens(self, number: int) -> bool:
        """Whether block `number` runs on fewer rows."""
        return bool(self.cut.groups) and number >= self._start

    def before_block(self, args: tuple, kwargs: dict[str, Any], states: Tensor) -> tuple[tuple, dict[str, Any]]:
        """The arguments of a block for the first group of rows; the others run after it."""
        self._uncut = args, kwargs, states
        return self._arguments_of(self.cut.groups[0], args, kwargs, states)

    def after_block(self, number: int, block: nn.Module, output: Any) -> Any:
        """Writes the rows that ran into the full states, and rebuilds the others."""
        if not self.cut.groups:
            return None
        rows = output[0] if isinstance(output, tuple) else output
        uncut, self._uncut = self._uncut, None
        if self._copies is not None:
            full = self._copies.spread(batched(rows))
        elif uncut is None:  # all rows ran; dropped ones are rebuilt nevertheless
            full = self._with_states_at_cut(batched(rows))
        else:
            full = self._all_groups(block, *uncut, batched(rows))
        if self._rebuilt is not None:
            full = self._rebuilt.apply(full)
        whole = full[0] if rows.dim() == 2 else full
        if self._copies is not None and self._copies.units is not None:
            self._output = whole
        if number >= self._start and not whole.is_inference():
            self._written = _Written(whole, whole._version, rows)
        return (whole, *output[1:]) if isinstance(output, tuple) else whole

    def before_merger(self, module: nn.Module, states: Any) -> Tensor | None:
        """The states of the merge groups that ran, for a merger of the last block's output; None leaves it all rows."""
        copies, output = self._copies, self._output
        if copies is None or output is None or states is not output or output.dim() != 2:
            return None
        if not self.call.treats_alone(module, output, copies.merge):
            return None
        ran = self.cut.groups[0].index[0]
        self.spared += (len(output) - len(ran)) // copies.merge * weights_per_token(module)
        return output.index_select(0, ran)

    def after_merger(self, output: Tensor) -> Tensor:
        """The merger's output for all merge groups."""
        assert self._copies is not None and self._copies.units is not None
        return output.index_select(0, self._copies.units)

    def count(self, work: BlockWork) -> None:
        """Counts that a block runs on fewer rows."""
        layout, groups = self.cut.layout, self.cut.groups
        work.tokens_after = sum(group.index.numel() for group in groups)
        offsets = groups[0].offsets.among(dict(enumerate(work.candidates)))
        if offsets is None and work.batch == 1 and not layout.fixed.any():
            offsets = layout.offsets
            work.candidates = [offsets]
        if offsets is None:
            work.pairs_after = sum(group.index.numel() * group.index.shape[1] for group in groups)
        else:
            work.pairs_after = int(arguments.cut_offsets(offsets, groups[0]).diff().square().sum())

    def _arguments_of(
        self, group: Rows, args: tuple, kwargs: dict[str, Any], states: Tensor
    ) -> tuple[tuple, dict[str, Any]]:
        """The arguments of a block for one group of rows."""
        written, rows = self._written, None
        if written is not None and states is written.full and len(self.cut.groups) == 1:
            rows = written.rows if states._version == written.version else None
        if rows is None:
            rows = group.take(batched(states), 1, True)
            rows = rows[0] if states.dim() == 2 else rows
        return arguments.cut(args, kwargs, group, rows)

    def _all_groups(self, block: nn.Module, args: tuple, kwargs: dict[str, Any], states: Tensor, ran: Tensor) -> Tensor:
        """States `[B, L, D]` after a block: those of the first group, which `ran`, and of the others, which run now."""
        full = self.cut.groups[0].put(batched(states), ran)
        for group in self.cut.groups[1:]:
            new_args, new_kwargs = self._arguments_of(group, args, kwargs, states)
            out = block.forward(*new_args, **new_kwargs)
            full = group.put(full, batched(out[0] if isinstance(out, tuple) else out))
        return full

    def _with_states_at_cut(self, full: Tensor) -> Tensor:
        """The states `full` at kept rows, and the states at the cut at all others."""
        base = batched(self.cut.states)
        for group in self.cut.groups:
            base = group.put(base, group.take(full, 1, True))
        return base
