# SPDX-License-Identifier: Apache-2.0
"""What a method reads besides the features, taken from vLLM's own modules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from ...methods import Method


class Reader:
    """Reads nothing: for methods that need the features alone."""

    @contextmanager
    def watch(self) -> Iterator[dict[str, list]]:
        """Records of what runs inside, by name."""
        yield {}

    def extra(
        self, seen: dict[str, list], features: list[Tensor], runs: list[list[int]], inputs: dict[str, Any]
    ) -> dict[str, Any]:
        """Further fields of `Tokens`."""
        return {}


def make(model: Any, config: Any, method: Method) -> Reader:
    """The reader that a method needs on a model."""
    return Reader()
