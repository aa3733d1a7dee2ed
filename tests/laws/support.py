# SPDX-License-Identifier: Apache-2.0
"""Helpers of the laws: cached models, recorded selections, the masked reference of a pruned call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from families import FAMILIES, Image, Video
from reference import Drops, masked

import vtprune
from vtprune.methods import Choice, Method, ScoreMethod, Stage, Tokens

RATIO = 0.3
ONE = [[3, Image(0), 5]]
MIXED = [[3, Image(0), 5], [2, Image(1), 4, Image(2), 7], [9]]
CLIP = [[3, Video(0), 5], [4, Image(1), 2, Video(1), 3]]


@dataclass
class Steps(ScoreMethod):
    """Three cuts, one of them before the decoder: the hardest case for caches and masks."""

    def schedule(self, num_layers: int) -> tuple[Stage, ...]:
        return Stage(0, 0.7), Stage(1, 0.5), Stage(3, 0.2)

    def score(self, tokens: Tokens) -> torch.Tensor:
        return tokens.hidden.norm(dim=-1)


@dataclass
class Middle(ScoreMethod):
    """One cut inside the decoder."""

    layer: int = 2

    def score(self, tokens: Tokens) -> torch.Tensor:
        return tokens.hidden.norm(dim=-1)


@dataclass
class Merging(Method):
    """One cut that rewrites the hidden states of the kept tokens."""

    layer: int = 1

    def choose(self, tokens: Tokens) -> Choice:
        from vtprune.core.ragged import top_k

        keep = top_k(tokens.hidden.norm(dim=-1), tokens.offsets, tokens.budgets)
        return Choice(keep, hidden=tokens.hidden * 0.5 + 0.1)


LAYOUTS: dict[str, Method] = {
    "input": Middle(layer=0),
    "middle": Middle(),
    "steps": Steps(),
    "merging": Merging(),
}


@lru_cache(maxsize=2)
def model_of(family: str, attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    return FAMILIES[family].build(attention, dtype)


def patched(model: torch.nn.Module, method: Any, **budget: Any) -> vtprune.Patch:
    """Patches a model, or skips the test if the method refuses the model."""
    import pytest

    try:
        return vtprune.patch(model, method=method, **(budget or {"ratio": RATIO}))
    except vtprune.MethodError as error:
        pytest.skip(f"refused: {error}")


def in_threads(work: Callable[[int], None], count: int) -> None:
    """Runs `work(0)`, ..., `work(count - 1)` concurrently, one thread each; reraises the first exception."""
    with ThreadPoolExecutor(count) as pool:
        for result in [pool.submit(work, number) for number in range(count)]:
            result.result()


class Spy:
    """Records the selections of a patch's method, with the states that a merging method wrote, for the reference."""

    def __init__(self, patch: vtprune.Patch) -> None:
        self.patch, self.choose = patch, patch.method.choose
        self.choices: list[tuple[Tokens, Choice]] = []
        patch.method.choose = self._record  # type: ignore[method-assign]

    def _record(self, tokens: Tokens) -> Choice:
        choice = self.choose(tokens)
        self.choices.append((tokens, choice))
        return choice

    def drops(self) -> Drops:
        """Tokens that the last prefill dropped, and states that it replaced."""
        last = self.patch.last
        assert last is not None
        drop = Drops.of(last)
        for tokens, choice in self.choices:
            if choice.hidden is not None:
                kept = choice.keep
                place = tokens.sample[kept], tokens.position[kept] + last.cached_before
                drop.merged[tokens.layer] = (*place, choice.hidden[kept])
        self.choices.clear()
        return drop

    def close(self) -> None:
        vars(self.patch.method).pop("choose", None)


@contextmanager
def pruned(model: torch.nn.Module, method: Any, **budget: Any) -> Iterator[tuple[vtprune.Patch, Spy]]:
    """Patches a model for the duration of the block; skips the test if the method refuses the model."""
    patch = patched(model, method, **budget)
    spy = Spy(patch)
    try:
        yield patch, spy
    finally:
        spy.close()
        patch.remove()


def survivors(drops: list[Drops], batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Positions whose token no cut dropped, `[B, T]` bool."""
    rows, length = batch["input_ids"].shape
    alive = batch["attention_mask"].bool().clone()
    for drop in drops:
        alive &= ~drop.mask(10_000, rows, length)
    return alive


def reference(model: torch.nn.Module, drops: list[Drops], batch: dict[str, torch.Tensor]) -> Any:
    """Context manager in which the unpatched `model` masks the tokens of `drops`."""
    return masked(vtprune.inspect(model).layers, drops, batch["attention_mask"])
