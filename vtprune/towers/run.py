# SPDX-License-Identifier: Apache-2.0
"""One call of a vision tower: selects patches at the cut, and runs the later blocks on the rows that are left.

Seen from outside, every block still takes and returns the full sequence, so class tokens, feature layers, DeepStack
taps, mergers and projectors see the usual shapes.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from ..report.tower import BlockWork, TowerRun
from ..vision import block_calls
from .arguments import with_states
from .method import TowerMethod
from .running import Running
from .selecting import BlockCall, Selecting, TowerCall


class RunningTower:
    """One call of a tower: `Selecting` up to the cut, `Running` after it.

    Attributes:
        call: Facts of the call.
        method: Method that selects patches; None only counts the tower's work.
        state: `Selecting`, `Running`, or None without a method.
        work: Work of the blocks that ran.
        selection_time: Host seconds that the selection took.
        uncut: Arguments of the block in progress, if they were cut.
    """

    def __init__(self, call: TowerCall, method: TowerMethod | None) -> None:
        self.call, self.method = call, method
        self.state: Selecting | Running | None = None if method is None else Selecting(call, method)
        self.work: list[BlockWork] = []
        self.selection_time = 0.0
        self.uncut: tuple[tuple, dict[str, Any]] | None = None
        self._recorded: TowerRun | None = None

    def before_embedding(self, module: nn.Module, pixels: Tensor) -> Tensor | None:
        """The pixels of the patches that stay, if the method selects them by pixels before block 0; else None."""
        early = self.state.select_by_pixels(module, pixels) if isinstance(self.state, Selecting) else None
        return None if early is None else pixels.index_select(0, early.ran)

    def after_embedding(self, output: Tensor) -> Tensor:
        """The embeddings of all patches; a dropped one has that of the patch that it is a copy of."""
        assert isinstance(self.state, Selecting) and self.state.early is not None
        return output.index_select(0, self.state.early.copies)

    def before_block(self, number: int, block: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Selects patches at the cut, and cuts the arguments of the blocks after it."""
        given, self.uncut = block_calls.states_of(args, kwargs), None
        if self.state is None:
            if given is not None:
                self._count(number, given, args, kwargs)
            return None
        if given is None or given.dim() not in (2, 3):
            shape = None if given is None else tuple(given.shape)
            raise UnsupportedModelError(
                f"the vision tower {type(self.call.parts.tower).__name__} cannot be cut: its blocks take states of "
                f"shape {shape}; expected one sequence of tokens, [N, D] or [B, N, D]; patch without tower="
            )
        states = given
        if isinstance(self.state, Selecting):
            block_call = BlockCall(block, args, kwargs)
            self.state.look(number, block_call, states)
            if number == self.call.at:
                states = self._cut(self.state, block_call, states)
        if states is not given:
            args, kwargs = with_states(args, kwargs, states)
        work = self._count(number, states, args, kwargs)
        if not isinstance(self.state, Running) or not self.state.shortens(number):
            return None if states is given else (args, kwargs)
        self.uncut = (args, kwargs)
        self.state.count(work)
        return self.state.before_block(args, kwargs, states)

    def _cut(self, selecting: Selecting, block_call: BlockCall, states: Tensor) -> Tensor:
        """Ends the selection before a block, and returns the states that the block gets."""
        started = time.perf_counter()
        cut = selecting.cut(block_call, states)
        self.state = Running(self.call, cut, selecting.method.stabilize)
        self.selection_time = selecting.seconds + time.perf_counter() - started
        return cut.states

    def after_block(self, number: int, block: nn.Module, output: Any) -> Any:
        """The output of a block for the full sequence; None if it is that."""
        running = self.state
        return running.after_block(number, block, output) if isinstance(running, Running) else None

    def before_merger(self, module: nn.Module, states: Any) -> Tensor | None:
        """The states of the merge groups that ran, for a merger of the last block's output; None leaves it all rows."""
        if not isinstance(self.state, Running):
            return None
        rows = self.state.before_merger(module, states)
        if self._recorded is not None:
            self._recorded.spared = self.state.spared
        return rows

    def after_merger(self, output: Tensor) -> Tensor:
        """The merger's output for all merge groups."""
        assert isinstance(self.state, Running)
        return self.state.after_merger(output)

    def _count(self, number: int, states: Tensor, args: tuple, kwargs: dict) -> BlockWork:
        """Records the work of a block on all rows."""
        batch, length = (1, len(states)) if states.dim() == 2 else (len(states), math.prod(states.shape[1:-1]))
        values = (*args[1:], *kwargs.values())
        integers = [v for v in values if isinstance(v, Tensor) and v.dim() == 1 and not v.is_floating_point()]
        candidates = [v for v in integers if v.dtype != torch.bool]
        weights = self.call.parts.weights[number]
        work = BlockWork(weights, states.shape[-1], batch, length, candidates, batch * length)
        self.work.append(work)
        return work

    def record(self) -> TowerRun | None:
        """The record of this call; None if it ended before the cut."""
        blocks, running = len(self.call.parts.blocks), self.state
        if self.method is None:
            tokens = self.work[0].batch * self.work[0].length if self.work else 0
            return TowerRun("", blocks, [], [], self.work, self._outside(tokens))
        if not isinstance(running, Running):
            return None
        cut, name = running.cut, type(self.method).__name__
        patches = cut.layout.offsets.diff().tolist()
        outside = self._outside(sum(patches))
        self._recorded = TowerRun(
            name, self.call.at, cut.kept, patches, self.work, outside, running.spared, self.selection_time
        )
        return self._recorded

    def _outside(self, patches: int) -> float:
        """Multiply-adds of patch embedding and merger."""
        parts = self.call.parts
        return patches * (parts.embedding_weights + parts.merger_weights / parts.merge**2)
