# SPDX-License-Identifier: Apache-2.0
"""What the tests of state share: small models built once, what a generation says, what a patch may leave behind."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from families import FAMILIES, Image, Prompt
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import vtprune
from vtprune import methods

PROMPTS: list[Prompt] = [[3, Image(0), 5], [6, Image(1), 4], [2, Image(2), 1, Image(0), 9], [5, Image(1)]]


@cache
def model(family: str, copy: int = 0) -> torch.nn.Module:
    """A model that a test may patch; `copy` makes another one with the same weights."""
    return FAMILIES[family].build()


@cache
def batches(family: str) -> list[dict[str, torch.Tensor]]:
    """Prompts of one sample each."""
    make = FAMILIES[family]
    if make.needs_types:
        # transformers keeps rope_deltas on the model: in threads, positions of unequal prompts mix even unpatched.
        return [make.batch([PROMPTS[0]], seed=seed) for seed in range(len(PROMPTS))]
    return [make.batch([prompt]) for prompt in PROMPTS]


@cache
def accepted(family: str) -> tuple[str, ...]:
    """Registered methods that do not refuse the family's model."""
    out = []
    for name in methods.for_pictures():
        try:
            vtprune.patch(model(family, -1), ratio=0.5, method=name).remove()
        except vtprune.MethodError:
            continue
        out.append(name)
    return tuple(out)


def generated(model: torch.nn.Module, batch: dict[str, torch.Tensor], **options: Any) -> list[list[int]]:
    """Four tokens, greedily."""
    return model.generate(**batch, max_new_tokens=4, do_sample=False, **options).tolist()  # type: ignore[operator]


def answer(patch: vtprune.Patch, batch: dict[str, torch.Tensor]) -> tuple[list, list]:
    """What a patched model generates, and what it kept."""
    tokens = generated(patch.model, batch)
    assert patch.last is not None
    return tokens, [kept.tolist() for kept in patch.last.kept]


def traces(model: torch.nn.Module) -> dict[str, Any]:
    """Everything a patch could leave behind on a model and beside it."""
    out: dict[str, Any] = {"registry": sorted(vars(ALL_ATTENTION_FUNCTIONS)), "state": list(model.state_dict())}
    for name, module in model.named_modules():
        out[name] = type(module), sorted(vars(module)), sorted(vars(type(module)))
        out[name + "/hooks"] = {k: list(v) for k, v in vars(module).items() if "hooks" in k and isinstance(v, dict)}
    return out
