# SPDX-License-Identifier: Apache-2.0
"""Modules that hold a vision-language model are unwrapped; of several, the error names each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, IMAGE, Image
from support import ONE, model_of
from torch import nn

import vtprune


class ValueHead(nn.Module):
    """A model with a value head, as in reinforcement learning."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.pretrained_model, self.v_head, self.config = model, nn.Linear(32, 1), model.config

    def forward(self, **inputs: Any) -> torch.Tensor:
        return self.v_head(self.pretrained_model(**inputs, output_hidden_states=True).hidden_states[-1])


class Engine(nn.Module):
    """An engine that holds the model as `module`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = model

    def forward(self, **inputs: Any) -> Any:
        return self.module(**inputs)


class Sentences(nn.Sequential):
    """sentence-transformers: a sequence whose first part holds the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(Engine(model), nn.Identity())

    def forward(self, **inputs: Any) -> Any:
        return self[1](self[0](**inputs))


@pytest.mark.parametrize("wrap", [ValueHead, Engine, Sentences, lambda model: Engine(ValueHead(model))])
def test_what_holds_a_model_is_unwrapped(wrap: Any) -> None:
    model, batch = model_of("llava"), FAMILIES["llava"].batch(ONE)
    wrapped = wrap(model)
    with torch.no_grad(), vtprune.patch(wrapped, ratio=0.3, method="uniform") as patch:
        wrapped(**batch)
        assert patch.anatomy.model is model and len(patch.last.kept[0]) == 8
        again = vtprune.patch(wrapped, ratio=0.5, method="uniform")
        assert patch.removed and not again.removed
        vtprune.unpatch(wrapped)
        assert again.removed


@pytest.mark.parametrize("part", ["", "model", "model.language_model"])
@pytest.mark.parametrize("method", ["uniform", "fastv"])
def test_a_forward_behind_a_function_of_any_arguments(method: str, part: str) -> None:
    """A forward that was wrapped, to time it say, is called as before; its class tells the names of its arguments."""
    model, batch = FAMILIES["llava"].build(), FAMILIES["llava"].batch(ONE)
    module = model.get_submodule(part)
    with torch.no_grad(), vtprune.patch(model, ratio=0.3, method=method):
        want = [model(**batch).logits, model(batch["input_ids"], batch["pixel_values"], batch["attention_mask"]).logits]
        tokens = model.generate(**batch, max_new_tokens=3, do_sample=False)
    forward = module.forward
    module.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    with torch.no_grad(), vtprune.patch(model, ratio=0.3, method=method):
        assert torch.equal(model(**batch).logits, want[0])
        again = model(batch["input_ids"], batch["pixel_values"], batch["attention_mask"]).logits
        assert torch.equal(again, want[1])
        if part:  # without a head's signature `generate` itself knows no pixels
            assert torch.equal(model.generate(**batch, max_new_tokens=3, do_sample=False), tokens)


def test_several_models_are_named() -> None:
    both = nn.ModuleDict({"policy": FAMILIES["llava"].build(), "reference": FAMILIES["llava"].build()})
    with pytest.raises(vtprune.UnsupportedModelError, match=r"policy: Llava.*reference: Llava"):
        vtprune.patch(both, ratio=0.3)


@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize("method", ["uniform", "iwp", "pyramiddrop"])
def test_fsdp_with_wrapped_layers_trains(original: bool, method: str, tmp_path: Path) -> None:
    """A patch on an FSDP model keeps the tokens and the loss of the model without FSDP, over two steps."""
    from torch import distributed
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    plain, model, batch = model_of("llava"), FAMILIES["llava"].build(), FAMILIES["llava"].batch(ONE)
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE, -100)
    with torch.no_grad(), vtprune.patch(plain, ratio=0.3, method=method) as patch:
        want, kept = plain(**batch, labels=labels).loss, patch.last.kept[0].tolist()
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        policy = ModuleWrapPolicy({type(vtprune.inspect(model).layers[0])})
        device = torch.device("cpu")
        sharded = FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=original, device_id=device)
        with vtprune.patch(sharded, ratio=0.3, method=method) as patch:
            for _ in range(2):
                loss = sharded(**batch, labels=labels).loss
                loss.backward()
                torch.testing.assert_close(loss, want)
                assert patch.last.kept[0].tolist() == kept
    finally:
        distributed.destroy_process_group()


PROMPTS = [ONE, [[3, 4, Image(1), 6, 7]]]


def _rank(rank: int, store: str, out: str) -> None:
    """One of two processes that share a model: saves loss and kept tokens of its prompt, and the error of `iwp`."""
    from torch import distributed
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model, batch = FAMILIES["llava"].build(), FAMILIES["llava"].batch(PROMPTS[rank])
    policy = ModuleWrapPolicy({type(vtprune.inspect(model).layers[0])})
    sharded = FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=torch.device("cpu"))
    with vtprune.patch(sharded, ratio=0.3) as patch:
        loss = sharded(**batch, labels=batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE, -100)).loss
        loss.backward()
        kept = patch.last.kept[0].tolist()
    with vtprune.patch(sharded, ratio=0.3, method="iwp"):
        try:
            sharded(**batch)
            message = ""
        except vtprune.MethodError as error:
            message = str(error)
    torch.save((loss.item(), kept, message), f"{out}/{rank}")
    distributed.barrier()
    distributed.destroy_process_group()


def test_fsdp_on_two_processes(tmp_path: Path) -> None:
    """Each process prunes its own prompt as alone; a method that would have to gather a layer is refused."""
    torch.multiprocessing.spawn(_rank, (str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    for rank, prompt in enumerate(PROMPTS):
        model, batch = model_of("llava"), FAMILIES["llava"].batch(prompt)
        labels = batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE, -100)
        with torch.no_grad(), vtprune.patch(model, ratio=0.3) as patch:
            want, kept = model(**batch, labels=labels).loss.item(), patch.last.kept[0].tolist()
        loss, got, message = torch.load(tmp_path / str(rank))
        assert got == kept and loss == pytest.approx(want, rel=1e-5)
        assert "sharded over 2 processes" in message


def test_the_default_method_reads_nothing_inside_a_layer() -> None:
    """The default method runs where no layer can be probed; one that needs queries and keys raises."""
    model, batch = FAMILIES["llava"].build(), FAMILIES["llava"].batch(ONE)

    def refuse(*_: Any, **__: Any) -> None:
        raise vtprune.MethodError("no keys before rotation, invented for this test")

    with torch.no_grad(), pytest.MonkeyPatch.context() as context:
        context.setattr("vtprune.models.attention_probe.probe", refuse)
        with vtprune.patch(model, ratio=0.3) as patch:
            model(**batch)
            assert patch.last.method == "resprune" and len(patch.last.kept[0]) == 8
        with vtprune.patch(model, ratio=0.3, method="iwp"), pytest.raises(vtprune.MethodError, match="invented"):
            model(**batch)
