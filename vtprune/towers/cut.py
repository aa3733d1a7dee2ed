# SPDX-License-Identifier: Apache-2.0
"""The hooks that cut a model's vision tower, and their state per thread.

`engine.session` attaches the hooks. They run before the hooks by which transformers captures hidden states, so that
full sequences are captured.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..core.method import Tap
from ..errors import UnsupportedModelError
from ..models.anatomy import Anatomy
from ..report.tower import TowerRun
from ..vision import block_calls
from . import products
from .copies import row_by_row
from .method import TowerMethod
from .run import RunningTower
from .selecting import TowerCall
from .structure import find_parts

RUNS = "towers.runs"


class _Stop(Exception):
    """Raised instead of running the first block; carries the states that it would get."""

    def __init__(self, states: Tensor) -> None:
        self.states = states


class _Thread(threading.local):
    def __init__(self) -> None:
        self.given: dict[str, Any] = {}  # arguments of the tower's call in progress
        self.running: RunningTower | None = None
        self.block: nn.Module | None = None  # the block in progress
        self.early: RunningTower | None = None  # the call whose patches were selected before the first block
        self.shortened = False  # whether the merger or patch embedding in progress was handed only rows that ran
        self.whole: tuple[nn.Module, tuple, dict] | None = None  # the module last handed fewer rows; all its rows
        self.finished: list[TowerRun] = []
        self.first: Tensor | None = None  # states entering block 0, if it was cut
        self.cut = False  # whether the call in progress was cut
        self.stopping = False  # whether the call in progress ends at block 0


class TowerCut:
    """The hooks of a tower method on a model's vision tower.

    Args:
        anatomy: Parts of the model.
        method: Method that selects patches; None only counts the tower's work.
        active: Tells whether calls of the current thread are cut.
        strict: Whether a share that rounds to all patches of a call is an error.

    Raises:
        UnsupportedModelError: The tower cannot be cut.
        BudgetError: The tower does not have the block before which the method cuts.
    """

    def __init__(
        self, anatomy: Anatomy, method: TowerMethod | None, active: Callable[[], bool], strict: bool = True
    ) -> None:
        self.strict = strict
        self.method, self.parts, self._active = method, find_parts(anatomy), active
        self.at = len(self.parts.blocks) if method is None else method.block_of(len(self.parts.blocks))
        self._thread = _Thread()
        self._alone: dict[nn.Module, bool] = {}  # modules that treat merge groups or patches one by one
        self._constant: dict[Any, Tensor] = {}  # rows that do not depend on pixels, by the shape of a picture

    def attach(self, wrap: Callable[[Callable], Callable]) -> list[Any]:
        """Registers the hooks.

        Args:
            wrap: Wraps each hook before it is registered.

        Returns:
            list: Handles, whose `remove` removes the hooks.
        """
        handles: list[Any] = []
        tower, last = self.parts.tower, self.parts.blocks[-1]
        for module, before, after in self.around():
            handles.append(module.register_forward_pre_hook(wrap(before), prepend=True, with_kwargs=True))
            if self.method is not None or module in (tower, last):
                always = module is tower  # also where it raises
                handles.append(
                    module.register_forward_hook(wrap(after), prepend=True, with_kwargs=True, always_call=always)
                )
        for module in row_by_row(self.parts) if self.method is not None else ():
            handles.append(module.register_forward_pre_hook(wrap(self._before_rows), with_kwargs=True))
            handles.append(module.register_forward_hook(wrap(self._after_rows), prepend=True, with_kwargs=True))
        return handles

    def products(self) -> Iterator[tuple[nn.Module, Callable]]:
        """Convolutions of the patch embedding, and what replaces their method `products.NAME`."""
        return products.find_products(row_by_row(self.parts) if self.method is not None else (), self._drops)

    def _drops(self) -> bool:
        """Whether the tower's call in progress is sure to drop patches, so that its numbers change anyway."""
        keep = None if self.method is None else self.method.keep
        share = isinstance(keep, float) and keep < 1
        return bool(self._thread.given) and (share or self._thread.shortened)

    def around(self) -> list[tuple[nn.Module, Callable, Callable]]:
        """Tower and blocks, each with the functions to call before and after its forward, as hooks with `kwargs`."""
        last = len(self.parts.blocks) - 1
        blocks = [(block, *self._hooks_of(number, number == last)) for number, block in enumerate(self.parts.blocks)]
        return [(self.parts.tower, self._before_tower, self._after_tower), *blocks]

    def tap(self) -> Tap:
        """Tap that records the tower's calls among the records of its encoder."""
        return Tap(RUNS, self.parts.tower, lambda args, kwargs, output: self._take())

    def uncut(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """The uncut arguments of a block, merger or patch embedding, for taps."""
        running, whole = self._thread.running, self._thread.whole
        if whole is not None and whole[0] is module:
            return whole[1:]
        called = None if running is None or self._thread.block is not module else running.uncut
        return (args, kwargs) if called is None else called

    def _before_tower(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        thread = self._thread
        if thread.stopping:
            return
        thread.running, thread.early, thread.first, thread.whole = None, None, None, None
        thread.given, thread.finished = {}, []
        if self._active():
            thread.given = block_calls.named(module, args, kwargs)

    def _after_tower(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        thread = self._thread
        if thread.stopping:
            return None
        cut, thread.cut = thread.cut, False
        first, thread.first, thread.running, thread.early, thread.given = thread.first, None, None, None, {}
        thread.whole = None
        if output is not None and not cut and self.method is not None and self._active():
            raise UnsupportedModelError(
                f"the vision tower {type(module).__name__} cannot be cut: it returned without calling its "
                f"{len(self.parts.blocks)} blocks one after another as modules; patch without tower="
            )
        return None if first is None or output is None else _with_first_states(output, first)

    def _before_rows(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Before a merger or patch embedding: hands it only the rows that ran, or will run."""
        thread, rows = self._thread, None
        thread.shortened, thread.whole = False, None
        if thread.stopping or not args or not isinstance(args[0], Tensor):
            return None
        if thread.running is not None:
            rows = thread.running.before_merger(module, args[0])
        elif any(args[0] is value for value in thread.given.values()):
            thread.early = self._begin()
            rows = thread.early.before_embedding(module, args[0])
        if rows is None:
            return None
        thread.shortened, thread.whole = True, (module, args, kwargs)
        return (rows, *args[1:]), kwargs

    def _after_rows(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        thread = self._thread
        if not thread.shortened:
            return None
        thread.shortened = False
        if thread.running is not None:
            return thread.running.after_merger(output)
        assert thread.early is not None
        return thread.early.after_embedding(output)

    def _hooks_of(self, number: int, last: bool) -> tuple[Callable, Callable]:
        def before_block(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            thread = self._thread
            if number == 0:
                if thread.stopping:
                    states = block_calls.states_of(args, kwargs)
                    raise _Stop(states if states is not None else torch.empty(0, dtype=torch.float32))
                early, thread.early = thread.early, None
                thread.running = None if not self._active() else self._begin() if early is None else early
            if thread.running is None:
                return None
            thread.block = module
            changed = thread.running.before_block(number, module, args, kwargs)
            if number == 0 and changed is not None:
                thread.first = block_calls.states_of(args, kwargs)
            return changed

        def after_block(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
            running = self._thread.running
            if running is None:
                return None
            changed = running.after_block(number, module, output)
            if last:
                record = running.record()
                if record is not None:
                    self._thread.cut = True
                    self._thread.finished.append(record)
            return changed

        return before_block, after_block

    def _begin(self) -> RunningTower:
        first = self.parts.blocks[0]
        checkpointed = self.method is not None and first.training and getattr(first, "gradient_checkpointing", False)
        if checkpointed and type(first).__call__ is not nn.Module.__call__:
            raise UnsupportedModelError(
                f"{type(first).__name__} is checkpointed together with its hooks, which the backward pass would run "
                "again; install transformers 5.23 or newer, or call gradient_checkpointing_disable()"
            )
        given = self._thread.given
        constant_rows, rerun = partial(self._constant_rows, given), partial(self._up_to_blocks, given)
        call = TowerCall(self.parts, self.at, given, constant_rows, rerun, self.strict, self._alone)
        return RunningTower(call, self.method)

    def _take(self) -> list[TowerRun] | None:
        finished, self._thread.finished = self._thread.finished, []
        return finished or None

    def _constant_rows(self, given: dict[str, Any]) -> Tensor:
        """Mask `[L]` of rows entering block 0 that do not depend on the pixels: class and register tokens.

        For every size of pictures, the tower is run up to its first block on two sets of artificial pixels.
        """
        pixels = {n: v for n, v in given.items() if isinstance(v, Tensor) and v.is_floating_point() and v.dim() == 4}
        key = tuple((name, tuple(value.shape[1:])) for name, value in pixels.items())
        if key not in self._constant:
            states = []
            for shift in (0.5, 1.5):
                pattern = {
                    name: (torch.arange(v[0].numel(), device=v.device).float().sin() * shift)
                    .reshape(v[0].shape)
                    .to(v.dtype)
                    for name, v in pixels.items()
                }
                changed = {name: value.expand_as(pixels[name]) for name, value in pattern.items()}
                states.append(self._up_to_blocks({**given, **changed}))
            self._constant[key] = (states[0][0] == states[1][0]).all(-1).cpu()
        return self._constant[key]

    @torch.no_grad()
    def _up_to_blocks(self, given: dict[str, Any]) -> Tensor:
        self._thread.stopping = True
        try:
            self.parts.tower(**given)
        except _Stop as stop:
            return stop.states
        finally:
            self._thread.stopping = False
        raise UnsupportedModelError(
            f"the vision tower {type(self.parts.tower).__name__} cannot be cut: it never calls its first block"
        )


def _with_first_states(output: Any, first: Tensor) -> Any:
    """Replaces the first of the output's hidden states by the full states entering block 0.

    transformers captures it from the first block's arguments, which are cut already.
    """
    hidden = getattr(output, "hidden_states", None)
    if isinstance(hidden, tuple) and hidden and hidden[0] is not None and hidden[0].shape != first.shape:
        output.hidden_states = (first, *hidden[1:])
    return output
