# SPDX-License-Identifier: Apache-2.0
"""Models, prompts and comparisons shared by the rows."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

from families import FAMILIES, Image  # noqa: E402
from reference import Drops, masked  # noqa: E402

import vtprune  # noqa: E402

FAMILY, STEPS = "llava", 6
# One method that cuts before the decoder, and one that reads the attention of the last token inside it.
METHODS = ("random", "fastv")


def build(family: str = FAMILY) -> nn.Module:
    """A fresh tiny model."""
    return FAMILIES[family].build()


def prompt(family: str = FAMILY) -> dict[str, Any]:
    """One prompt with a picture."""
    return FAMILIES[family].batch([[3, Image(0), 5]])


@contextmanager
def patched(model: nn.Module, method: str = "fastv") -> Iterator[vtprune.Patch]:
    """Patches the model to a fifth of its visual tokens."""
    with vtprune.patch(model, ratio=0.2, method=method) as patch:
        yield patch


@torch.no_grad()
def greedy(model: nn.Module, inputs: dict[str, Any], **extra: Any) -> list[list[int]]:
    """The new tokens."""
    out = model.generate(**inputs, max_new_tokens=STEPS, do_sample=False, **extra)
    return out[:, inputs["input_ids"].shape[1] :].tolist()


def kept(patch: vtprune.Patch) -> list[list[int]]:
    """Columns that the last prefill kept; asserts that it dropped some."""
    last = patch.last
    assert last is not None, "nothing was pruned, and no error was raised"
    assert all(len(k) < len(v) for k, v in zip(last.kept, last.visual, strict=True))
    return [k.tolist() for k in last.kept]


def same_as_masked(model: nn.Module, inputs: dict[str, Any], method: str = "fastv") -> None:
    """Asserts that the pruned model generates the same as the unpruned model with the dropped columns masked."""
    with patched(model, method) as patch:
        got, last = greedy(model, inputs), patch.last
        kept(patch)
    with masked(vtprune.inspect(model).layers, [Drops.of(last)], inputs["attention_mask"]):
        assert greedy(model, inputs) == got
