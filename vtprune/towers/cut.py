# SPDX-License-Identifier: Apache-2.0
"""The cut of one model's vision tower: what its hooks do, thread by thread.

`engine.patching` attaches the hooks. They come before those by which transformers captures hidden states, so that
what is captured is the full sequence with the rows put back.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..core.method import Tap
from ..errors import UnsupportedModelError
from ..models.anatomy import Anatomy
from ..report.tower import TowerRun
from . import arguments
from .method import TowerMethod
from .run import RunningTower
from .structure import find_parts

RUNS = "towers.runs"


class _Stop(Exception):
    """Raised where the first block would run, with the states that it would get."""

    def __init__(self, states: Tensor) -> None:
        self.states = states


class _Thread(threading.local):
    def __init__(self) -> None:
        self.given: dict[str, Any] = {}  # arguments of the tower's running call
        self.running: RunningTower | None = None
        self.block: nn.Module | None = None  # the running block
        self.finished: list[TowerRun] = []
        self.first: Tensor | None = None  # states entering block 0, where it was cut
        self.cut = False  # whether the running call was cut
        self.stopping = False  # inside a call that ends at block 0


class TowerCut:
    """A tower method at work on a model's vision tower.

    Args:
        anatomy: Parts of the model.
        method: Chooses the patches; None only counts what the tower does.
        active: Whether calls of the present thread are cut.

    Raises:
        UnsupportedModelError: The tower cannot be cut.
        BudgetError: It has no such block.
    """

    def __init__(self, anatomy: Anatomy, method: TowerMethod | None, active: Callable[[], bool]) -> None:
        self.method, self.parts, self._active = method, find_parts(anatomy), active
        self.at = len(self.parts.blocks) if method is None else method.block_of(len(self.parts.blocks))
        self._thread = _Thread()
        self._constant: dict[Any, Tensor] = {}  # rows that do not depend on pixels, by the shape of a picture

    def attach(self, wrap: Callable[[Callable], Callable]) -> list[Any]:
        """Attaches the hooks.

        Args:
            wrap: Makes the callable that is registered.

        Returns:
            list: Handles; their `remove` takes the hooks off.
        """
        tower, last = self.parts.tower, len(self.parts.blocks) - 1
        handles = [
            tower.register_forward_pre_hook(wrap(self._before_tower), prepend=True, with_kwargs=True),
            tower.register_forward_hook(wrap(self._after_tower), prepend=True, with_kwargs=True, always_call=True),
        ]
        for number, block in enumerate(self.parts.blocks):
            before, after = self._hooks_of(number, number == last)
            handles.append(block.register_forward_pre_hook(wrap(before), prepend=True, with_kwargs=True))
            handles.append(block.register_forward_hook(wrap(after), prepend=True, with_kwargs=True))
        return handles

    def tap(self) -> Tap:
        """Records what the tower's calls did, where the engine keeps the records of its encoders."""
        return Tap(RUNS, self.parts.tower, lambda args, kwargs, output: self._take())

    def uncut(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """What a block was called with, for taps that would otherwise see cut arguments."""
        running = self._thread.running
        called = None if running is None or self._thread.block is not module else running.uncut()
        return (args, kwargs) if called is None else called

    # --- hooks --------------------------------------------------------------------------------------------------------

    def _before_tower(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        thread = self._thread
        if thread.stopping:
            return
        thread.running, thread.first, thread.given, thread.finished = None, None, {}, []
        if self._active():
            thread.given = arguments.named(module, args, kwargs)

    def _after_tower(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        thread = self._thread
        if thread.stopping:
            return None
        cut, thread.cut = thread.cut, False
        first, thread.first, thread.running, thread.given = thread.first, None, None, {}
        if output is not None and not cut and self.method is not None and self._active():
            raise UnsupportedModelError(
                f"the vision tower {type(module).__name__} cannot be cut: it finished without calling its "
                f"{len(self.parts.blocks)} blocks one after another as modules; patch without tower="
            )
        return None if first is None or output is None else _with_first_states(output, first)

    def _hooks_of(self, number: int, last: bool) -> tuple[Callable, Callable]:
        def before_block(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            thread = self._thread
            if number == 0:
                if thread.stopping:
                    states = arguments.states_of(args, kwargs)
                    raise _Stop(states if states is not None else torch.empty(0))
                thread.running = self._begin() if self._active() else None
            if thread.running is None:
                return None
            thread.block = module
            changed = thread.running.before_block(number, module, args, kwargs)
            if number == 0 and changed is not None:
                thread.first = arguments.states_of(args, kwargs)
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
        checkpointed = first.training and getattr(first, "gradient_checkpointing", False)
        if checkpointed and type(first).__call__ is not nn.Module.__call__ and self.method is not None:
            raise UnsupportedModelError(
                f"{type(first).__name__} is checkpointed together with its hooks, which the backward pass would run "
                "again; install a newer transformers, or call gradient_checkpointing_disable()"
            )
        given = self._thread.given
        return RunningTower(self.parts, self.method, self.at, given, lambda: self._constant_rows(given))

    def _take(self) -> list[TowerRun] | None:
        finished, self._thread.finished = self._thread.finished, []
        return finished or None

    # --- class tokens -------------------------------------------------------------------------------------------------

    def _constant_rows(self, given: dict[str, Any]) -> Tensor:
        """`[L]` bool, the rows of the states entering block 0 that stay the same when all pixels change.

        The tower runs up to its first block on other pixels, once for every size of pictures.
        """
        pixels = {n: v for n, v in given.items() if isinstance(v, Tensor) and v.is_floating_point() and v.dim() == 4}
        key = tuple((name, tuple(value.shape[1:])) for name, value in pixels.items())
        if key not in self._constant:
            states = []
            for shift in (0.5, 1.5):
                pattern = {
                    name: (torch.arange(v[0].numel(), device=v.device).reshape(v[0].shape).sin() * shift).to(v.dtype)
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
    """The tower's output with the full states entering block 0 among its hidden states.

    transformers captures them from the first block's arguments, which are cut already.
    """
    hidden = getattr(output, "hidden_states", None)
    if isinstance(hidden, tuple) and hidden and hidden[0] is not None and hidden[0].shape != first.shape:
        output.hidden_states = (first, *hidden[1:])
    return output
