# SPDX-License-Identifier: Apache-2.0
"""Hypothesis state machine: patch, pause, remove and patch again, in any order, on two models."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from functools import cache
from typing import Any

import pytest
import torch
from families import FAMILIES
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from standing import PROMPTS, generated, model, traces

import vtprune

FAMILY = "llava"
RECIPES: list[dict[str, Any]] = [
    {"method": "iwp", "ratio": 0.3},
    {"method": "random", "keep": 4},
    {"method": "pyramiddrop", "mean_ratio": 0.6},
    {"method": "visionzip", "ratio": 0.2},
]
numbers = st.integers(0, 1)


@cache
def batch(prompt: int) -> dict[str, torch.Tensor]:
    return FAMILIES[FAMILY].batch([PROMPTS[prompt]])


@cache
def expected(recipe: int | None, prompt: int) -> tuple[list, list | None]:
    """Answer and kept columns of a fresh model under a recipe (None: unpatched)."""
    fresh = FAMILIES[FAMILY].build()
    if recipe is None:
        return generated(fresh, batch(prompt)), None
    with vtprune.patch(fresh, **RECIPES[recipe]) as patch:
        return generated(fresh, batch(prompt)), [kept.tolist() for kept in patch.last.kept]


class Lifecycle(RuleBasedStateMachine):
    """Tracks the expected recipe of each of two models, and whether its patch is paused."""

    def __init__(self) -> None:
        super().__init__()
        self.models = [model(FAMILY, 0), model(FAMILY, 1)]
        self.patches: list[vtprune.Patch | None] = [None, None]
        self.recipes: list[int | None] = [None, None]
        self.pauses: list[list[ExitStack]] = [[], []]  # of the current patch
        self.stale: list[vtprune.Patch] = []  # replaced or removed patches whose handles users may still hold
        self.stale_pauses: list[ExitStack] = []

    @initialize()
    def warm(self) -> None:
        for each in self.models:
            generated(each, batch(0))  # transformers creates caches of its own on first use
        self.clean = [traces(each) for each in self.models]

    # --- user actions -------------------------------------------------------------------------------------------------

    @rule(which=numbers, recipe=st.integers(0, len(RECIPES) - 1))
    def patch(self, which: int, recipe: int) -> None:
        """Patches a model that may already have a patch, paused or not."""
        new = vtprune.patch(self.models[which], **RECIPES[recipe])
        self._retire(which)
        self.patches[which], self.recipes[which] = new, recipe

    @rule(which=numbers)
    def patch_that_fails(self, which: int) -> None:
        for wrong in ({"ratio": 0.2, "method": "no_such_method"}, {"ratio": 2.0}):
            with pytest.raises(vtprune.VTPruneError):
                vtprune.patch(self.models[which], **wrong)  # type: ignore[arg-type]

    @rule(which=numbers, by=st.sampled_from(["remove", "unpatch", "with"]))
    def remove(self, which: int, by: str) -> None:
        patch = self.patches[which]
        if patch is None or by == "unpatch":
            vtprune.unpatch(self.models[which])
        elif by == "remove":
            patch.remove()
        else:
            with patch:
                pass
        self._retire(which)

    @precondition(lambda self: self.stale)
    @rule(data=st.data())
    def remove_a_stale_one(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self.stale)).remove()

    @precondition(lambda self: any(self.patches))
    @rule(which=numbers)
    def pause(self, which: int) -> None:
        patch = self.patches[which]
        if patch is not None:
            stack = ExitStack()
            stack.enter_context(patch.paused())
            self.pauses[which].append(stack)

    @precondition(lambda self: any(self.pauses) or self.stale_pauses)
    @rule(which=numbers)
    def resume(self, which: int) -> None:
        pauses = self.pauses[which] or self.stale_pauses
        if pauses:
            pauses.pop().close()

    @rule(which=numbers)
    def copy(self, which: int) -> None:
        if self.patches[which] is None:
            copied = copy.deepcopy(self.models[which])
            assert generated(copied, batch(0)) == expected(None, 0)[0]
        else:
            with pytest.raises(vtprune.VTPruneError, match="remove"):
                copy.deepcopy(self.models[which])

    @rule(which=numbers, layer=st.integers(0, 3), error=st.sampled_from([RuntimeError, KeyboardInterrupt]))
    def interrupt(self, which: int, layer: int, error: type[BaseException]) -> None:
        def fail(*_: Any) -> None:
            raise error("stop")

        module = vtprune.inspect(self.models[which]).layers[layer]
        handle = module.register_forward_pre_hook(fail)
        try:
            with pytest.raises(error):
                self.models[which](**batch(1))
        finally:
            handle.remove()

    @rule(which=numbers, prompt=st.integers(0, len(PROMPTS) - 1))
    def generate(self, which: int, prompt: int) -> None:
        patch = self.patches[which]
        before = None if patch is None else patch.last
        pruned = patch is not None and not self.pauses[which]
        tokens, kept = expected(self.recipes[which] if pruned else None, prompt)
        assert generated(self.models[which], batch(prompt)) == tokens
        if pruned:
            assert patch is not None and patch.last is not before
            assert patch.last is not None and [k.tolist() for k in patch.last.kept] == kept
        elif patch is not None:
            assert patch.last is before

    # --- invariants ---------------------------------------------------------------------------------------------------

    @invariant()
    def unpatched_models_are_clean(self) -> None:
        for each, patch, clean in zip(self.models, self.patches, getattr(self, "clean", []), strict=False):
            if patch is None:
                now = traces(each)
                if any(self.patches):  # the other model's patch has wrapped the registry of attention functions
                    now, clean = now | {"registry": None}, clean | {"registry": None}
                assert now == clean
            else:
                assert not patch.removed and vtprune.engine.patching.find_patch(each) is patch
        assert all(patch.removed for patch in self.stale)

    def _retire(self, which: int) -> None:
        patch = self.patches[which]
        if patch is not None:
            self.stale.append(patch)
        self.stale_pauses += self.pauses[which]
        self.patches[which], self.recipes[which], self.pauses[which] = None, None, []

    def teardown(self) -> None:
        for each in self.models:
            vtprune.unpatch(each)
        for each, clean in zip(self.models, getattr(self, "clean", []), strict=False):
            assert traces(each) == clean
