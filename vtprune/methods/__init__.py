# SPDX-License-Identifier: Apache-2.0
"""Pruning methods: one file each, found by importing every module of this package."""

from __future__ import annotations

import importlib
import pkgutil

from .base import AttentionInputs, Choice, Method, ScoreMethod, Stage, Tap, Tokens
from .registry import get, names, register, resolve

_INFRASTRUCTURE = {"base", "registry"}

for _module in pkgutil.iter_modules(__path__):
    if _module.name not in _INFRASTRUCTURE:
        _loaded = importlib.import_module(f"{__name__}.{_module.name}")
        for _value in list(vars(_loaded).values()):
            # A registered class is a public name of this package: vtprune.methods.IWP.
            if isinstance(_value, type) and issubclass(_value, Method) and _value.__module__ == _loaded.__name__:
                globals()[_value.__name__] = _value

__all__ = [
    "AttentionInputs",
    "Choice",
    "Method",
    "ScoreMethod",
    "Stage",
    "Tap",
    "Tokens",
    "get",
    "names",
    "register",
    "resolve",
]
