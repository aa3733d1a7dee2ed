# SPDX-License-Identifier: Apache-2.0
"""The arguments of a layer at the positions that are left.

A decoder makes rotations, position ids and masks for all positions of a call and passes the same ones to every layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core.transfer import to_device
from ..errors import UnsupportedModelError
from ..models.arguments import map_tensors
from ..models.attended import is_block_mask
from ..models.transformers_names import PROMPT_LENGTH
from . import gather, kv_cache, positions
from .columns import Columns
from .layer_masks import LayerMasks
from .masks import AttentionForm

_Arguments = dict[Any, Any]  # by name, or by place


class LayerArguments:
    """Cuts the arguments of the layers that run on the current layout of `columns`; made anew after every cut.

    Args:
        columns: The positions that are left.
        form: Makes the form of attention mask that the decoder takes, when a mask is needed.
    """

    def __init__(self, columns: Columns, form: Callable[[], AttentionForm]) -> None:
        self.columns = columns
        self._masks = LayerMasks(columns, form, self._on_device)
        # What was made, by ids of its sources; values reference the sources, so that the ids stay unique.
        self._gathered: dict[int, tuple[Tensor, Tensor]] = {}
        self._copies: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}
        self._cut: dict[tuple, tuple[_Arguments, _Arguments, _Arguments]] = {}

    def of_layer(self, number: int, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """The arguments of layer `number`; hidden states pass unchanged."""
        if self.stay(args, kwargs):
            return args, kwargs
        if self.columns.is_cut:
            self._shorten_prompt(number)
        given: _Arguments = {**kwargs, **dict(enumerate(args[1:], 1))}
        given.pop("hidden_states", None)
        shift = self.columns.state.shift(number) if self.columns.state is not None else None
        # All but masks is the same for every layer that is given the same.
        key = (*map(id, given.values()), *given, id(shift))
        if key not in self._cut:
            masks = {name: value for name, value in given.items() if self._is_mask(name, value)}
            others = {name: value for name, value in given.items() if name not in masks}
            self._cut[key] = given, masks, self._shifted(self._gather(others), shift)
        _, masks, others = self._cut[key]
        new = {**others, **{name: self._masks.of_layer(number, mask) for name, mask in masks.items()}}
        return (*args[:1], *(new.pop(place) for place in range(1, len(args)))), {**kwargs, **new}

    def stay(self, args: tuple, kwargs: dict[str, Any]) -> bool:
        """Whether arguments stay as they are: in decoding steps without a mask, the most frequent calls by far."""
        columns = self.columns
        if columns.is_cut or columns.state is None or not columns.is_plain:
            return False
        for name, value in kwargs.items():
            if value is not None and "mask" in name:
                return False
        return len(args) < 2 or not any(isinstance(value, Tensor) and value.dim() == 4 for value in args[1:])

    def _shorten_prompt(self, number: int) -> None:
        """Tells a cached layer whose window keeps the prompt how many of its tokens are left.

        Raises:
            UnsupportedModelError: An earlier call filled the layer: its window counts slots, not positions.
        """
        columns = self.columns
        prompt = kv_cache.lasting_prompt(columns.cache, number)
        if not prompt:
            return
        if columns.past:
            raise UnsupportedModelError(
                f"layer {number} has a sliding window beside the first prompt, so that later turns cannot be cut; give "
                "all pictures in the first prompt, or run this turn inside patch.paused()"
            )
        setattr(columns.cache.layers[number], PROMPT_LENGTH, min(prompt, columns.index.shape[1]))

    def _is_mask(self, name: str | int, value: Any) -> bool:
        if "mask" in str(name) or is_block_mask(value):
            return True
        square = (self.columns.length, self.columns.past + self.columns.length)
        return isinstance(value, Tensor) and value.dim() == 4 and tuple(value.shape[2:]) == square

    def _gather(self, given: _Arguments) -> _Arguments:
        """Gathers the kept positions of all tensors that have all positions, in as few kernel launches as possible."""
        columns = self.columns
        if not columns.is_cut:
            return given
        groups: dict[Tensor, dict[int, tuple[Tensor, int]]] = {}  # tensors with their dimension of positions, by index
        for name, value in given.items():
            index = columns.source if name in positions.NAMES else columns.index
            tensors: list[Tensor] = []
            map_tensors(value, tensors.append)
            for x in tensors:
                dim = gather.column_dim(x, columns.batch, columns.length)
                if dim is not None and id(x) not in self._gathered:
                    groups.setdefault(self._on_device(index, x.device), {})[id(x)] = (x, dim)
        for index, group in groups.items():
            for (x, _), kept in zip(group.values(), gather.gather_all([*group.values()], index), strict=True):
                self._gathered[id(x)] = (x, kept)
        return {n: map_tensors(v, lambda x: self._gathered.get(id(x), (x, x))[1]) for n, v in given.items()}

    def _shifted(self, given: _Arguments, shift: positions.Shift | None) -> _Arguments:
        """Rotations and position ids for a layer that renumbered its tokens in an earlier call."""
        if shift is None:
            return given
        return {n: shift.apply(n, v) if n in positions.NAMES else v for n, v in given.items()}

    def _on_device(self, tensor: Tensor, device: torch.device) -> Tensor:
        """`tensor` on a device, copied once."""
        key = (id(tensor), device)
        if key not in self._copies:
            self._copies[key] = (tensor, to_device(tensor, device))
        return self._copies[key][1]
