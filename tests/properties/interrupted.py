# SPDX-License-Identifier: Apache-2.0
"""Generations that end in an exception at any place must not affect the next generation."""

from __future__ import annotations

import contextlib
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from standing import answer, batches, generated, model, traces
from transformers import StoppingCriteria, StoppingCriteriaList

import vtprune


class _Stops(StoppingCriteria):
    """Stopping criterion that raises after `after` tokens."""

    def __init__(self, after: int) -> None:
        self.after = after

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> Any:
        self.after -= 1
        if self.after < 0:
            raise RuntimeError("the caller's criterion failed")
        return torch.zeros(len(input_ids), dtype=torch.bool)


@contextmanager
def failing(module: torch.nn.Module, error: type[BaseException], calls: int) -> Iterator[None]:
    """Makes `module` raise `error` at its `calls`-th call inside the block."""
    left = [calls]

    def hook(*_: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise error("stand-in")

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def method_failing(patch: vtprune.Patch, error: type[BaseException]) -> Iterator[None]:
    """Makes the method raise `error` when it selects tokens, after the engine has read its inputs."""
    choose = patch.method.choose

    def fails(tokens: Any) -> Any:
        choose(tokens)
        raise error("stand-in")

    patch.method.choose = fails  # type: ignore[method-assign]
    try:
        yield
    finally:
        del patch.method.choose


def _interruptions(patch: vtprune.Patch, batch: dict) -> Iterator[tuple[str, type[BaseException], Callable[[], Any]]]:
    """Yields name, exception and a generation that raises it."""

    def generate_in(context: Any) -> Callable[[], Any]:
        def run() -> None:
            with context:
                generated(patch.model, batch)

        return run

    for after in (0, 2):
        criteria = StoppingCriteriaList([_Stops(after)])
        yield (
            f"criterion after {after} tokens",
            RuntimeError,
            lambda criteria=criteria: generated(patch.model, batch, stopping_criteria=criteria),  # type: ignore[misc]
        )
    layers, tower = patch.anatomy.layers, patch.anatomy.vision_tower
    for error in (torch.OutOfMemoryError, KeyboardInterrupt):
        for number, calls in ((0, 1), (len(layers) - 1, 1), (1, 3)):
            # The first call of layer 0 may come from the attention probe.
            yield f"{error.__name__}, layer {number}", error, generate_in(failing(layers[number], error, calls))
        yield f"{error.__name__}, vision tower", error, generate_in(failing(tower, error, 1))
        yield f"{error.__name__}, method", error, generate_in(method_failing(patch, error))


def check_interrupted(family: str, method: str) -> int:
    """Interrupts generations at every place; asserts unchanged pruning after each, and no trace after `remove`.

    Returns:
        int: Number of interrupted generations.
    """
    own, batch, other = model(family), batches(family)[0], batches(family)[-1]
    plain, clean = generated(own, batch), traces(own)
    count = 0
    with vtprune.patch(own, method=method, ratio=0.3) as patch:
        want, want_other = answer(patch, batch), answer(patch, other)
        for name, error, run in _interruptions(patch, batch):
            try:
                run()
            except error:
                count += 1
            else:
                raise AssertionError(f"{family}, {method}, {name}: the generation was not interrupted")
            assert answer(patch, other) == want_other, f"{family}, {method}: after {name}"
            assert answer(patch, batch) == want, f"{family}, {method}: after {name}"
    assert traces(own) == clean and generated(own, batch) == plain
    return count


def _places(model: torch.nn.Module, batch: dict[str, torch.Tensor], inside: str, at: int = 0) -> list[int]:
    """Generates, and returns a hash of the stack at every call and return in files whose name contains `inside`.

    Raises:
        KeyboardInterrupt: At event `at`, counted from 1.
    """
    seen: list[int] = []

    def profile(frame: Any, event: str, what: Any) -> None:
        if inside not in frame.f_code.co_filename or event not in ("call", "return", "c_return"):
            return
        stack: list[Any] = [event, getattr(what, "__name__", None) if event == "c_return" else None]
        while not at and frame is not None:
            stack.append((frame.f_code, frame.f_lineno))
            frame = frame.f_back
        seen.append(hash(tuple(stack)))
        if len(seen) == at:
            sys.setprofile(None)
            raise KeyboardInterrupt

    sys.setprofile(profile)
    try:
        generated(model, batch)
    finally:
        sys.setprofile(None)
    return seen


def check_every_call(family: str, method: str, inside: str, stride: int = 1, **options: Any) -> int:
    """Interrupts generations at calls and returns of functions in files whose name contains `inside`.

    These are places where Python handles a signal. Unlike `check_signals`, nothing is left to chance. Every place is
    tried the first and the last time that it is reached with the same stack of calls: the times between, at further
    layers and tokens, repeat them. With a `stride`, it is every `stride`-th call and return instead. `options` are
    those of `vtprune.patch`.

    Returns:
        int: Number of interrupted generations.
    """
    own, batch = model(family), batches(family)[0]
    with vtprune.patch(own, method=method, ratio=0.3, **options) as patch:
        want, seen = answer(patch, batch), _places(own, batch, inside)
        first = {place: number for number, place in reversed(list(enumerate(seen, 1)))}
        last = {place: number for number, place in enumerate(seen, 1)}
        every = sorted({*first.values(), *last.values()})
        numbers = every if stride == 1 else range(1, len(seen) + 1, stride)
        for number in numbers:
            with contextlib.suppress(KeyboardInterrupt):
                _places(own, batch, inside, number)
                raise AssertionError(f"{family}, {method}: there is no event {number} in {inside}")
            assert answer(patch, batch) == want, f"{family}, {method}: after event {number} in {inside}"
    return len(numbers)


def check_signals(family: str, method: str, times: int, seed: int = 0) -> int:
    """Like `check_interrupted`, with SIGINT at random moments (between any two Python instructions).

    Returns:
        int: Number of the `times` generations that the signal interrupted.
    """
    own, batch = model(family), batches(family)[0]
    draw, count = random.Random(seed), 0

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with vtprune.patch(own, method=method, ratio=0.3) as patch:
            want = answer(patch, batch)
            started = time.perf_counter()
            answer(patch, batch)
            span = time.perf_counter() - started
            for _ in range(times):
                try:
                    signal.setitimer(signal.ITIMER_REAL, draw.uniform(0.0005, span))
                    generated(patch.model, batch)
                    signal.setitimer(signal.ITIMER_REAL, 0)
                except KeyboardInterrupt:
                    count += 1
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
                assert answer(patch, batch) == want, f"{family}, {method}: after a signal"
    finally:
        signal.signal(signal.SIGALRM, before)
    return count
