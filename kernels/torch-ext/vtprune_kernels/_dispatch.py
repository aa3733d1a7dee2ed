# SPDX-License-Identifier: Apache-2.0
"""Dispatch of operations to PyTorch or Triton, by device."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_DEVICES = {"cuda", "xpu"}  # ROCm devices are called cuda by PyTorch


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def on_gpu(tensor: Tensor) -> bool:
    """Whether the Triton path is used: the tensor is on a GPU and Triton is installed."""
    return tensor.device.type in _DEVICES and _installed()


def triton_source(operation: str) -> Callable[..., Any]:
    """The Triton path of an operation, imported when it is first needed.

    Triton launches on the current device, so the device of the first tensor is made current during the call.
    """
    run = getattr(importlib.import_module(f".{operation}.triton", __package__), operation)

    def run_on_device(*arguments: Any, **options: Any) -> Any:
        device = next(value.device for value in arguments if isinstance(value, Tensor))
        with torch.accelerator.device_index(device.index):
            return run(*arguments, **options)

    return run_on_device
