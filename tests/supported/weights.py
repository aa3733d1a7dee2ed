# SPDX-License-Identifier: Apache-2.0
"""Rows for device placement and format of weights."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import vtprune
from tests.supported.models import build, greedy, kept, patched, prompt, same_as_masked
from tests.supported.table import refused, row


@row("`save_pretrained` of a patched model")
def saving(folder: Path) -> None:
    """Reloaded, the model is unpatched, its weights and logits are those of before, bit for bit."""
    from transformers import AutoModelForImageTextToText

    model, inputs = build(), prompt()
    with torch.no_grad():
        logits = model(**inputs).logits
        with patched(model) as patch:
            model(**inputs)
            kept(patch)
            model.save_pretrained(folder)
        again = AutoModelForImageTextToText.from_pretrained(folder).eval()
        assert torch.equal(again(**inputs).logits, logits)
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in vtprune.inspect(again).layers)
    assert not [p for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pkl")]


@row("`state_dict` and `load_state_dict`")
def state(folder: Path) -> None:
    """While patched: the names are the model's own, and new weights are used at once."""
    model, other, inputs = build(), build(), prompt()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.9)
        with patched(other) as patch:
            want, columns = greedy(other, inputs), kept(patch)
        with patched(model) as patch:
            assert model.state_dict().keys() == other.state_dict().keys()
            model.load_state_dict(other.state_dict())
            assert greedy(model, inputs) == want and kept(patch) == columns


@row("`copy.deepcopy` of a patched model")
def copying(folder: Path) -> str:
    """Refused, since the copy's hooks would prune for the original; after `remove` the model is copied, and the copy
    can be patched."""
    model, inputs = build(), prompt()
    with patched(model) as patch:
        want, columns = greedy(model, inputs), kept(patch)
        message = refused(lambda: copy.deepcopy(model))
        assert greedy(model, inputs) == want
    twin = copy.deepcopy(model)
    with patched(twin) as patch:
        assert greedy(twin, inputs) == want and kept(patch) == columns
    return message


@row("`pickle` and `torch.save` of a patched model")
def pickling(folder: Path) -> str:
    """Refused; after `remove` both work."""
    model = build()
    with patched(model):
        message = refused(lambda: pickle.dumps(model))
        assert refused(lambda: torch.save(model, folder / "model.pt")) == message
    pickle.dumps(model)
    return message


@row("`device_map` over two devices", "accelerate")
def device_map(folder: Path) -> None:
    """Half of the decoder on the CPU, the projector and the other half on disk, where weights are meta tensors between
    calls (`accelerate.dispatch_model`): same kept tokens and text as on one device."""
    import accelerate

    model, split, inputs = build(), build(), prompt()
    names = vtprune.inspect(model).names
    far = (names["projector"], *(f"{names['decoder']}.layers.{i}" for i in (2, 3)))
    near = [n for n, m in model.named_modules() if n and any(True for _ in m.parameters(recurse=False))]
    places = {name: "disk" if name.startswith(far) else "cpu" for name in near}
    split = accelerate.dispatch_model(split, places, main_device="cpu", offload_dir=folder, force_hooks=True)
    assert next(vtprune.inspect(split).layers[3].parameters()).is_meta
    for method in ("random", "fastv", "iwp"):
        with patched(model, method) as patch:
            want, columns = greedy(model, inputs), kept(patch)
        with patched(split, method) as patch:
            assert greedy(split, inputs) == want and kept(patch) == columns


def _quantized(quantize: Callable[[nn.Module], Any]) -> None:
    """Asserts that a pruned quantized model generates the same as unpruned with the dropped tokens masked."""
    for method in ("random", "fastv", "iwp"):
        model, inputs = build(), prompt()
        plain = greedy(model, inputs)
        quantize(vtprune.inspect(model).decoder)
        same_as_masked(model, inputs, method)
        assert plain


@row("torchao, int8 weights", "torchao")
def torchao_int8(folder: Path) -> None:
    """Language model with `Int8WeightOnlyConfig`: pruned text is that of the quantized model that cannot see the
    dropped tokens."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    _quantized(lambda module: quantize_(module, Int8WeightOnlyConfig()))


def _bitsandbytes(make: Callable[[nn.Linear], nn.Module]) -> Callable[[nn.Module], None]:
    def quantize(module: nn.Module) -> None:
        for parent in list(module.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear:
                    new = make(child)
                    new.load_state_dict(child.state_dict())
                    setattr(parent, name, new.to("cpu"))

    return quantize


@row("bitsandbytes, nf4 weights", "bitsandbytes")
def bitsandbytes_nf4(folder: Path) -> None:
    """Linear layers of the language model as `Linear4bit`: the same."""
    import bitsandbytes

    def make(linear: nn.Linear) -> nn.Module:
        size = linear.in_features, linear.out_features
        return bitsandbytes.nn.Linear4bit(*size, bias=linear.bias is not None, quant_type="nf4")

    _quantized(_bitsandbytes(make))


@row("bitsandbytes, int8 weights", "bitsandbytes")
def bitsandbytes_int8(folder: Path) -> None:
    """Linear layers of the language model as `Linear8bitLt`: the same."""
    import bitsandbytes

    def make(linear: nn.Linear) -> nn.Module:
        size = linear.in_features, linear.out_features
        return bitsandbytes.nn.Linear8bitLt(*size, bias=linear.bias is not None, has_fp16_weights=False)

    _quantized(_bitsandbytes(make))


@row("Gradient checkpointing")
def checkpointing(folder: Path) -> None:
    """Training steps on a patched model: loss and gradients are those without checkpointing."""
    inputs = prompt()
    labels = inputs["input_ids"].clone()
    labels[:, :-3] = -100
    results = []
    for checkpointed in (False, True):
        model = build().train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        with patched(model) as patch:
            loss = model(**inputs, labels=labels).loss
            columns = kept(patch)
            loss.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        results.append((loss.detach(), columns, gradients))
    (loss, columns, plain), (again, same, recomputed) = results
    assert columns == same and plain and plain.keys() == recomputed.keys()
    torch.testing.assert_close(again, loss)
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-4, atol=1e-6)


@row("LoRA adapters (PEFT)", "peft")
def adapters(folder: Path) -> None:
    """A patched model wrapped with an adapter, and a wrapped model patched, keep the same tokens and give the same
    answer."""
    import peft

    config = peft.LoraConfig(r=2, target_modules=r".*language_model.*\.(q_proj|v_proj)", init_lora_weights=False)
    inputs, answers = prompt(), []
    for first in ("patch", "adapter"):
        model = build()
        torch.manual_seed(5)
        if first == "adapter":
            model = peft.get_peft_model(model, config)
        with patched(model) as patch:
            if first == "patch":
                model = peft.get_peft_model(model, config)
            answers.append((greedy(model.eval(), inputs), kept(patch)))
    assert answers[0] == answers[1]
