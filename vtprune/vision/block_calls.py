# SPDX-License-Identifier: Apache-2.0
"""Recognizes what a block of a vision tower is called with: states, masks, offsets and tables, by their shapes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from ..models.arguments import map_tensors, parameters_of


class Offsets:
    """Recognizes offsets of packed sequences (`cu_seqlens`) among the arguments of one tower call; reads each once.

    Args:
        batch, length: Shape `[B, L]` of the tower's states.
    """

    def __init__(self, batch: int, length: int) -> None:
        self.batch, self.length = batch, length
        self._known: dict[int, tuple[Any, Tensor | None]] = {}

    def read(self, value: Any) -> Tensor | None:
        """`value` as `[S + 1]` int64 on the host if it holds offsets from 0 to the number of tokens, else None."""
        if self.batch != 1 or not isinstance(value, Tensor) or value.dim() != 1 or value.is_floating_point():
            return None
        if value.dtype == torch.bool or not 2 <= len(value) <= self.length + 1:
            return None
        if id(value) not in self._known:
            found = value.detach().cpu().long()
            fits = int(found[0]) == 0 and int(found[-1]) == self.length and bool((found.diff() >= 0).all())
            self._known[id(value)] = (value, found if fits else None)
        return self._known[id(value)][1]

    def among(self, values: dict[Any, Any]) -> Tensor | None:
        """The offsets among a block's arguments, or None."""
        return next((o for v in values.values() if (o := self.read(v)) is not None), None)


def named(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a call by name, including those in `*args` and `**kwargs`."""
    return parameters_of(module).bind(args, kwargs)


def states_of(args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
    """The hidden states among a block's arguments, which come first."""
    value = args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values()), None))
    return value if isinstance(value, Tensor) else None


def mask_among(values: dict[str, Any]) -> Tensor | None:
    """The attention mask among a block's arguments, or None.

    Raises:
        UnsupportedModelError: It is one of flex attention.
    """
    found = next((v for name, v in values.items() if "mask" in name and v is not None), None)
    if found is not None and not isinstance(found, Tensor):
        raise UnsupportedModelError(
            f"the mask of the vision tower is a {type(found).__name__}; tower= supports tensors only: load the model "
            'with attn_implementation="sdpa", "eager" or "flash_attention_2"'
        )
    return found


def tables_among(values: dict[str, Any], length: int) -> list[Tensor]:
    """Tensors `[L, ...]` among a block's arguments that are shared by the whole batch, such as rotations."""
    found: list[Tensor] = []
    for name, value in values.items():
        if "mask" not in name:
            map_tensors(value, lambda x: found.append(x) if x.dim() >= 2 and len(x) == length else None)
    return found
