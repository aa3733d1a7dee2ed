# SPDX-License-Identifier: Apache-2.0
"""Law 7: `remove` restores hooks, attributes, classes, registries, state dict and outputs."""

from __future__ import annotations

import copy
import itertools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from support import ONE, Middle, model_of, patched
from transformers import AutoModelForImageTextToText
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import vtprune

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs",
         "_forward_hooks_always_called", "_backward_hooks", "_backward_pre_hooks")  # fmt: skip


def trace(model: torch.nn.Module) -> dict[str, Any]:
    """All state of a model and of its registries that a patch could change."""
    out: dict[str, Any] = {"registry": dict(vars(ALL_ATTENTION_FUNCTIONS)), "state": list(model.state_dict())}
    for name, module in model.named_modules():
        out[name] = (type(module), sorted(vars(module)), sorted(vars(type(module))))
        out[name + "/hooks"] = {hook: dict(getattr(module, hook)) for hook in HOOKS}
    return out


def test_remove(family: str, method: str) -> None:
    model, batch = model_of(family), FAMILIES[family].batch(ONE)
    logits = model(**batch, output_hidden_states=True).logits  # transformers installs hooks of its own on first use
    before = trace(model)
    patch = patched(model, method)
    assert trace(model) != before
    model(**batch)
    patch.remove()
    patch.remove()
    assert trace(model) == before
    assert torch.equal(model(**batch).logits, logits)


def test_with_block_replacing_and_unpatch(family: str) -> None:
    model = model_of(family)
    before = trace(model)
    with vtprune.patch(model, ratio=0.5) as first:
        second = vtprune.patch(model, ratio=0.1, method="random")
        assert first.removed and not second.removed
    assert not second.removed
    with pytest.raises(RuntimeError), vtprune.patch(model, ratio=0.5) as third:
        assert second.removed
        raise RuntimeError
    assert third.removed
    vtprune.patch(model, ratio=0.2)
    vtprune.unpatch(model)
    vtprune.unpatch(model)
    assert trace(model) == before


def test_a_failed_patch_leaves_the_old_one(family: str) -> None:
    model = model_of(family)
    before = trace(model)
    with vtprune.patch(model, ratio=0.5) as patch:
        with pytest.raises(vtprune.MethodError):
            vtprune.patch(model, ratio=0.5, method="no_such_method")
        for budget in ({"ratio": 7}, {"mean_ratio": 0.1}):  # the layers before the cut alone cost more
            with pytest.raises(vtprune.BudgetError):
                vtprune.patch(model, **budget, method="iwp")
        with pytest.raises(vtprune.MethodError):
            vtprune.patch(model, ratio=0.5, method=Middle(layer=9))
        assert not patch.removed
    assert trace(model) == before


def test_saving_copying_and_pickling(family: str, tmp_path: Path) -> None:
    model, batch = model_of(family), FAMILIES[family].batch(ONE)
    logits = model(**batch).logits
    with vtprune.patch(model, ratio=0.5):
        model.save_pretrained(tmp_path)
        for copying in (copy.deepcopy, pickle.dumps):
            with pytest.raises(vtprune.VTPruneError, match=r"patch\.remove\(\)"):
                copying(model)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(**batch).logits, logits)
    assert torch.equal(copy.deepcopy(model)(**batch).logits, logits)


def test_parts_whose_methods_are_replaced_are_not_copied(family: str) -> None:
    """A copy would run the original's weights."""
    model = model_of(family)

    def replaced() -> list[torch.nn.Module]:
        return [m for layer in vtprune.inspect(model).layers for m in layer.modules() if "forward" in vars(m)]

    before = replaced()
    with vtprune.patch(model, ratio=0.5, method="fastv"):
        parts = replaced()
        assert len(parts) > len(before)
        for part, copying in itertools.product(parts, (copy.deepcopy, pickle.dumps)):
            with pytest.raises(vtprune.VTPruneError, match=r"patch\.remove\(\)"):
                copying(part)
    assert replaced() == before
    copy.deepcopy(parts)


def test_peft(family: str, method: str) -> None:
    """A model with a PEFT adapter can be patched, and the patch is removed without trace."""
    peft = pytest.importorskip("peft")
    model, batch = FAMILIES[family].build(), FAMILIES[family].batch(ONE)
    targets = r".*(language_model|text_model).*\.(q_proj|v_proj)"
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config).eval()
    logits = wrapped(**batch).logits
    patch = patched(wrapped, method)
    out = wrapped.generate(**batch, max_new_tokens=3)
    assert out.shape[0] == 1 and len(patch.last.kept[0]) < len(patch.last.visual[0])
    vtprune.unpatch(wrapped)
    assert patch.removed
    assert torch.equal(wrapped(**batch).logits, logits)
