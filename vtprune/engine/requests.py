# SPDX-License-Identifier: Apache-2.0
"""Settings of one request, made by `paused`, `using`, `visual` and `question` blocks, in a context variable.

A block applies to the code inside it, in its thread or asyncio task, and to the tasks and plain threads that this code
starts (transformers' streaming recipe runs `generate` in one). Other requests are not affected. Python itself passes
context variables to tasks and to `asyncio.to_thread`; threads get them from `threading.Thread.start`, which is wrapped
while a block is open. Worker threads of pools outlive the request that started them and get nothing: submit
`contextvars.copy_context().run` to a pool instead.

Generators have no context of their own. Blocks of two that take turns apply to both while they are open, the one that
began last before the other; and each takes only its own settings away, in whatever order they end.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from ..core.budget import Budget
    from .spec import PruneSpec

_POOLS = ("concurrent.futures", "multiprocessing", "joblib", "anyio")


@dataclass(frozen=True)
class Request:
    """Settings of the current request; the defaults change nothing.

    Attributes:
        paused: Whether prefills are left unpruned.
        budget: Budget that replaces the patch's own.
        spec: Specification with another method that replaces the patch's own.
        visual: `[B, T]` visual positions of the prompt: a bool mask, or token ids with placeholders.
        question_end: Position at which the answer begins, one for all rows or one for each.
    """

    paused: bool = False
    budget: Budget | None = None
    spec: PruneSpec | None = None
    visual: Tensor | None = None
    question_end: int | Sequence[int] | Tensor | None = None


_DEFAULT = Request()
# For each patch with open blocks: a reference to it, the settings that apply, and the changes of each block, by which
# the block is known.
_requests: ContextVar[tuple[tuple[weakref.ref, Request, tuple[dict[str, Any], ...]], ...]] = ContextVar(
    "vtprune_requests", default=()
)


def current(patch: Any) -> Request:
    """Settings of the current request for `patch`."""
    for owner, request, _ in _requests.get():
        if owner() is patch:
            return request
    return _DEFAULT


@contextmanager
def override(patch: Any, **changes: Any) -> Iterator[None]:
    """Changes the request's settings for `patch` in the code inside, and in the tasks and threads that it starts."""
    _apply(patch, (*_blocks(patch), changes))
    _InheritingThreads.begin()
    try:
        yield
    finally:
        _InheritingThreads.end()
        # Blocks of generators end in any order; and some frameworks end one in another context than it began in.
        _apply(patch, tuple(block for block in _blocks(patch) if block is not changes))


def _blocks(patch: Any) -> tuple[dict[str, Any], ...]:
    """Changes of the open blocks of a patch, in the order in which they began."""
    return next((blocks for owner, _, blocks in _requests.get() if owner() is patch), ())


def _apply(patch: Any, blocks: tuple[dict[str, Any], ...]) -> None:
    """Makes `blocks` the open blocks of a patch."""
    others = tuple(entry for entry in _requests.get() if entry[0]() not in (None, patch))
    request = functools.reduce(lambda settings, changes: replace(settings, **changes), blocks, _DEFAULT)
    _requests.set((*others, (weakref.ref(patch), request, blocks)) if blocks else others)


class _InheritingThreads:
    """Wraps `threading.Thread.start`, while any block is open, to pass requests to plain threads."""

    lock = threading.Lock()
    blocks = 0
    installed = False
    original: Any = None

    @classmethod
    def begin(cls) -> None:
        with cls.lock:
            cls.blocks += 1
            if not cls.installed:
                cls.original, cls.installed = threading.Thread.start, True
                threading.Thread.start = _start  # type: ignore[method-assign]

    @classmethod
    def end(cls) -> None:
        with cls.lock:
            cls.blocks -= 1
            # If another library has wrapped `start` since, its wrapper still calls `_start`.
            if cls.blocks == 0 and threading.Thread.start is _start:
                threading.Thread.start, cls.installed = cls.original, False  # type: ignore[method-assign]


def _start(self: threading.Thread) -> None:
    requests = _requests.get()
    homes = (type(self).__module__, getattr(getattr(self, "_target", None), "__module__", None) or "")
    if requests and not any(home.split(".")[0] in _POOLS or home.startswith(_POOLS) for home in homes):
        run = self.run

        def run_with_requests() -> None:
            _requests.set(requests)
            run()

        self.run = run_with_requests  # type: ignore[method-assign]
    _InheritingThreads.original(self)
