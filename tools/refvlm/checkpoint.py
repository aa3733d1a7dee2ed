# SPDX-License-Identifier: Apache-2.0
"""Training checkpoints as safetensors, so that resuming unpickles nothing."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


def save(path: Path, learner: nn.Module, optimizers: Iterable[torch.optim.Optimizer], step: int) -> None:
    """Writes weights, optimizer states and the step atomically."""
    tensors: dict[str, Tensor] = {f"learner/{name}": value for name, value in learner.state_dict().items()}
    about: list[dict[str, Any]] = []
    for number, optimizer in enumerate(optimizers):
        state = optimizer.state_dict()
        about.append({"param_groups": state["param_groups"], "values": {}})
        for parameter, values in state["state"].items():
            for name, value in values.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer/{number}/{parameter}/{name}"] = value
                else:
                    about[-1]["values"][f"{parameter}/{name}"] = value
    # safetensors has no shared tensors, so tied weights are cloned.
    whole = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
    new = path.with_suffix(".new")
    save_file(whole, new, metadata={"step": str(step), "optimizers": json.dumps(about)})
    new.replace(path)


def load(path: Path, device: torch.device) -> tuple[dict[str, Tensor], list[dict[str, Any]], int]:
    """Reads what `save` wrote.

    Returns:
        tuple: State of the learner, states of the optimizers, number of steps.
    """
    with safe_open(path, framework="pt", device=str(device)) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
        metadata = file.metadata()
    learner: dict[str, Tensor] = {}
    states: list[dict[str, Any]] = []
    for about in json.loads(metadata["optimizers"]):
        states.append({"state": {}, "param_groups": about["param_groups"]})
        for key, value in about["values"].items():
            parameter, name = key.split("/", 1)
            states[-1]["state"].setdefault(int(parameter), {})[name] = value
    for name, value in tensors.items():
        kind, rest = name.split("/", 1)
        if kind == "learner":
            learner[rest] = value
        else:
            number, parameter, what = rest.split("/", 2)
            states[int(number)]["state"].setdefault(int(parameter), {})[what] = value
    return learner, states, int(metadata["step"])
