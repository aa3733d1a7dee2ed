# SPDX-License-Identifier: Apache-2.0
"""Tensors that a method reads and must not change in place."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..errors import MethodError


class Lent:
    """Tensors of the model, or of other calls, that a method was given, with their versions at that time."""

    def __init__(self) -> None:
        self._versions: list[tuple[str, Tensor, int]] = []

    def add(self, name: str, value: Any) -> None:
        """Adds a tensor under its name in messages; in inference mode torch counts no versions, and none is added."""
        if isinstance(value, Tensor) and not value.is_inference():
            self._versions.append((name, value, value._version))

    def check(self, method: str) -> None:
        """Raises `MethodError` if a tensor was changed in place since it was added.

        Args:
            method: Name of the method, for the message.
        """
        for name, value, version in self._versions:
            if value._version != version:
                raise MethodError(f"{method} changed {name} in place; expected it to change copies (.clone()) only")
