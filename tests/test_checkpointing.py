# SPDX-License-Identifier: Apache-2.0
"""Gradient checkpointing: layers recomputed in the backward pass get the inputs of their first run.

transformers before 5.23 recomputes layers with their hooks, newer versions without.
"""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from families import FAMILIES, Image

import vtprune
from vtprune.engine import checkpointing, deepstack

PROMPTS = [[3, Image(0), 5], [2, Image(1), 3]]


def training(family: str, checkpointed: bool, reentrant: bool = False) -> torch.nn.Module:
    model = FAMILIES[family].build().train()
    model.enable_input_require_grads()
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    return model


def labeled(family: str, number: int) -> dict[str, Any]:
    batch = FAMILIES[family].batch([PROMPTS[number]])
    labels = batch["input_ids"].clone()
    labels[:, :-3] = -100
    return batch | {"labels": labels}


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", ["random", "pyramiddrop", "pooling"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl"])
def test_gradients_are_those_without_checkpointing(family: str, method: str, reentrant: bool) -> None:
    """Two prompts with live graphs have the gradients of a run without checkpointing, DeepStack features included."""
    found = []
    for checkpointed in (False, True):
        model = training(family, checkpointed, reentrant)
        if method == "pooling" and any(map(checkpointing.runs_hooks_again, vtprune.inspect(model).layers)):
            pytest.skip("merged states are constants under the checkpointing of transformers before 5.23")
        with vtprune.patch(model, ratio=0.3, method=method) as patch:
            losses = [model(**labeled(family, n)).loss for n in (0, 1)]
            assert patch.last is not None
            for loss in reversed(losses):
                loss.backward()
        found.append((torch.stack(losses).detach(), gradients(model)))
    (loss, plain), (again, recomputed) = found
    torch.testing.assert_close(again, loss)
    assert plain and plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-4, atol=1e-6)


def test_nothing_grows() -> None:
    def tensors() -> int:
        gc.collect()
        return sum(type(x) is torch.Tensor for x in gc.get_objects())

    model, counts = training("llava", True), []
    with vtprune.patch(model, ratio=0.3, method="pyramiddrop"):
        for _ in range(4):
            model(**labeled("llava", 0)).loss.backward()
            counts.append(tensors())
    assert len(set(counts[1:])) == 1, counts


class Again(torch.nn.Module):
    """A layer that is checkpointed together with its hooks."""

    gradient_checkpointing = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs)


def test_what_a_layer_was_given_is_found_again_by_its_rotation() -> None:
    layer, rotation, mask = Again(), (torch.rand(1, 4, 2), torch.rand(1, 4, 2)), torch.ones(1, 4)
    hidden, short = torch.rand(1, 4, 8), (torch.rand(1, 2, 2), torch.rand(1, 2, 2))
    given = {"attention_mask": mask, "position_embeddings": rotation, "use_cache": False}
    checkpointing.save_arguments(
        2, layer, ((hidden,), given), ((hidden,), given | {"position_embeddings": short}), lambda x: x[:, 1:3]
    )
    args, kwargs = checkpointing.replay(2, layer, (hidden,), dict(given))
    assert torch.equal(args[0], hidden[:, 1:3])
    assert kwargs["position_embeddings"] is short and kwargs["attention_mask"] is mask
    assert checkpointing.replay(1, layer, (hidden,), given) is None  # another layer
    assert checkpointing.replay(2, layer.eval(), (hidden,), given) is None
    assert not checkpointing.runs_hooks_again(torch.nn.Linear(1, 1).train())
    with pytest.raises(vtprune.UnsupportedModelError, match="gradient_checkpointing_disable"):
        checkpointing.save_arguments(2, layer, ((hidden,), {"use_cache": False}), ((hidden,), {}), None)


def test_features_between_layers_may_be_picked_when_they_are_asked_for() -> None:
    mask, rows = torch.tensor([[True, True, True, False]]), torch.rand(3, 5)
    index, alive = torch.tensor([[1, 3]]), torch.ones(1, 2, dtype=torch.bool)
    for features in ([rows], {0: rows}):
        picked = []
        for later in (False, True):
            planes, given = deepstack.intercept_deepstack({"mask": mask, "features": features}, (1, 4), later)
            assert torch.equal(given["features"][0], rows)
            planes.cut(index, alive)
            picked.append(given["features"][0])
        assert torch.equal(picked[0], rows[1:2]) and torch.equal(picked[1], rows[1:2])
    assert torch.equal(given["features"].get(0), rows[1:2]) and given["features"].get(7) is None
