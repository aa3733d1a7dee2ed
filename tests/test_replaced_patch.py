# SPDX-License-Identifier: Apache-2.0
"""A patch on a patched model replaces the old one, and `remove` leaves no trace of either."""

from __future__ import annotations

import pytest

import vtprune
from vtprune import refvlm
from vtprune.engine.patching import find_patch


def test_the_new_patch_is_whole_and_comes_off():
    model, processor = refvlm.load()
    inputs = processor(images=refvlm.scenes.scene(1).image, text=refvlm.prompt("what?"), return_tensors="pt")
    before = set(vars(model)), set(vars(model.model))
    old = vtprune.patch(model, ratio=0.1)
    once = set(vars(model)), set(vars(model.model))
    new = vtprune.patch(model, keep=20, method="zoo_prune")  # reads the encoder's output
    assert old.removed and find_patch(model) is new
    assert once == (set(vars(model)), set(vars(model.model)))
    model.generate(**inputs, max_new_tokens=1)
    assert new.last.tokens == (144, 20) and old.last is None
    old.remove()
    new.remove()
    assert before == (set(vars(model)), set(vars(model.model)))


def test_the_end_of_a_block_restores_the_patch_of_the_block_around_it():
    model, _ = refvlm.load()
    before = set(vars(model)), set(vars(model.model))
    with vtprune.patch(model, ratio=0.1) as outer:
        with vtprune.patch(model, ratio=0.3) as middle:
            with vtprune.patch(model, ratio=0.5) as inner, outer:
                assert find_patch(model) is outer and inner.removed
            assert find_patch(model) is middle
            vtprune.patch(model, ratio=0.6)  # without a block: it replaces the patch for good
            with vtprune.patch(model, ratio=0.7) as last, last:
                assert find_patch(model) is last
            assert find_patch(model) is middle
            with pytest.raises(vtprune.BudgetError), vtprune.patch(model, ratio=0.3):
                vtprune.patch(model, mean_ratio=0.1, method="iwp")
            assert find_patch(model) is middle
        assert find_patch(model) is outer and not outer.removed
        with vtprune.patch(model, ratio=0.3):
            outer.remove()
        assert find_patch(model) is None
    assert before == (set(vars(model)), set(vars(model.model)))


def test_blocks_that_end_in_the_order_in_which_they_began_leave_no_patch():
    model, _ = refvlm.load()
    first, second = vtprune.patch(model, ratio=0.1).__enter__(), vtprune.patch(model, ratio=0.3).__enter__()
    first.__exit__()
    assert find_patch(model) is second
    second.__exit__()
    assert find_patch(model) is None


def test_a_block_that_ends_before_one_inside_it_leaves_the_patch_around_both():
    model, _ = refvlm.load()
    outer, middle, inner = (vtprune.patch(model, ratio=ratio).__enter__() for ratio in (0.1, 0.3, 0.5))
    middle.__exit__()
    assert find_patch(model) is inner
    inner.__exit__()
    assert find_patch(model) is outer
    outer.__exit__()
    assert find_patch(model) is None
