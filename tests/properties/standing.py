# SPDX-License-Identifier: Apache-2.0
"""Helpers of the state tests: cached small models, prompts, generations, and traces of a patch."""

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
    """A cached model for patching; another `copy` has the same weights."""
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
    """Registered methods that accept the family's model."""
    out = []
    for name in methods.for_pictures():
        try:
            vtprune.patch(model(family, -1), ratio=0.5, method=name).remove()
        except vtprune.MethodError:
            continue
        out.append(name)
    return tuple(out)


def generated(model: torch.nn.Module, batch: dict[str, torch.Tensor], **options: Any) -> list[list[int]]:
    """Prompt and four greedy tokens."""
    return model.generate(**batch, max_new_tokens=4, do_sample=False, **options).tolist()  # type: ignore[operator]


def answer(patch: vtprune.Patch, batch: dict[str, torch.Tensor]) -> tuple[list, list]:
    """Generated tokens and kept columns of a patched model."""
    tokens = generated(patch.model, batch)
    assert patch.last is not None
    return tokens, [kept.tolist() for kept in patch.last.kept]


def traces(model: torch.nn.Module) -> dict[str, Any]:
    """All state of a model and of global registries that a patch could change."""
    out: dict[str, Any] = {"registry": sorted(vars(ALL_ATTENTION_FUNCTIONS)), "state": list(model.state_dict())}
    for name, module in model.named_modules():
        out[name] = type(module), sorted(vars(module)), sorted(vars(type(module)))
        out[name + "/hooks"] = {k: list(v) for k, v in vars(module).items() if "hooks" in k and isinstance(v, dict)}
    return out
