# SPDX-License-Identifier: Apache-2.0
"""Compiled, exported and traced models."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import vtprune
from tests.supported.models import build, greedy, kept, patched, prompt
from tests.supported.table import refused, row

BACKEND = "aot_eager"  # full dynamo and autograd tracing, without generated kernels
# Cuts inside the decoder, before it, before it by the keys of its first layer, and progressive cuts.
CUTS = ("fastv", "divprune", "iwp", "pyramiddrop")


@torch.no_grad()
def _same(compile_: Callable[[nn.Module], nn.Module], before: bool, method: str = "fastv") -> None:
    """Asserts that a model compiled before or after patching prunes as it does uncompiled."""
    torch.compiler.reset()
    inputs, model = prompt(), build()
    with patched(model, method) as patch:
        logits = model(**inputs).logits
        want, columns = greedy(model, inputs), kept(patch)
    compiled = compile_(model) if before else model
    with patched(compiled, method) as patch:
        compiled = compiled if before else compile_(model)
        torch.testing.assert_close(compiled(**inputs).logits, logits, rtol=1e-4, atol=1e-4)
        assert kept(patch) == columns
        assert greedy(compiled, inputs) == want
        assert kept(patch) == columns


def _whole(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend=BACKEND)


def _decoder(model: nn.Module) -> nn.Module:
    vtprune.inspect(model).decoder.compile(backend=BACKEND)
    return model


def _inductor(model: nn.Module) -> nn.Module:
    vtprune.inspect(model).decoder.compile()
    return model


def _layers(model: nn.Module) -> nn.Module:
    for layer in vtprune.inspect(model).layers:
        layer.compile(backend=BACKEND)
    return model


def _forward(model: nn.Module) -> nn.Module:
    model.forward = torch.compile(model.forward, backend=BACKEND)
    return model


@row("`torch.compile(model)`")
def whole(folder: Path) -> None:
    """Compiled after `patch` (aot_eager): same kept tokens, logits and greedy text as uncompiled; the graph ends at
    every hook."""
    _same(_whole, False)


@row("`model.forward = torch.compile(model.forward)`", slow=True)
def forward(folder: Path) -> None:
    """Before `patch`: the same, for methods that cut inside the decoder, before it, and step by step."""
    for method in CUTS:
        _same(_forward, True, method)


@row("`torch.compile` of the language model", slow=True)
def decoder(folder: Path) -> None:
    """`language_model.compile()` before `patch`: the same, for methods that cut inside the decoder, before it, and
    step by step."""
    for method in CUTS:
        _same(_decoder, True, method)


@row("`torch.compile` of the language model, Inductor", slow=True)
def inductor(folder: Path) -> None:
    """The default backend, with kernels made by the C++ compiler, before `patch`: the same."""
    if shutil.which("g++") is None:
        raise FileNotFoundError("Inductor takes a C++ compiler, and there is no g++")
    for method in CUTS:
        _same(_inductor, True, method)


@row("`torch.compile` of every decoder layer", slow=True)
def layers(folder: Path) -> None:
    """`layer.compile()`, before and after `patch`: the same, for methods that cut inside the decoder, before it, and
    step by step. Where a method reads keys, the layer runs uncompiled."""
    for method in CUTS:
        _same(_layers, True, method)
        _same(_layers, False, method)


@row("`torch.compile(fullgraph=True)`")
def fullgraph(folder: Path) -> str:
    """A selection depends on values, so torch raises with the hook's reason. Single layers of the language model, and
    an unpatched model, compile with `fullgraph=True`."""
    torch.compiler.reset()
    model, inputs = build(), prompt()
    with patched(model), torch.no_grad():
        compiled = torch.compile(model, backend=BACKEND, fullgraph=True)
        message = refused(lambda: compiled(**inputs), torch._dynamo.exc.Unsupported)
    reason = "which tokens stay depends on values"
    assert reason in message, message
    return message[message.index(reason) :].split(")")[0]


@row("`torch.export`")
def export(folder: Path) -> str:
    """`torch.export.export` of a patched model."""
    model, inputs = build(), prompt()
    with patched(model), torch.no_grad():
        return refused(lambda: torch.export.export(model, (), dict(inputs), strict=False))


@row("`torch.jit.trace`")
def trace(folder: Path) -> str:
    """A trace would apply one prompt's selection to all prompts."""
    model, inputs = build().requires_grad_(False), prompt()
    arguments = (inputs["input_ids"], inputs["pixel_values"])
    with patched(model), torch.no_grad():
        return refused(lambda: torch.jit.trace(lambda i, p: model(input_ids=i, pixel_values=p).logits, arguments))
