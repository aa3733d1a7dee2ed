# SPDX-License-Identifier: Apache-2.0
"""DeepStack: visual features that a decoder adds to its visual columns between its first layers (Qwen3-VL)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class LiveMask(Tensor):
    """A mask that the decoder holds on to, and that stands for another one after every cut.

    Every operation on it is done with `current`. It is not changed in place, because autograd keeps the masks that it
    stood for.
    """

    current: Tensor

    @staticmethod
    def of(mask: Tensor) -> LiveMask:
        live = Tensor._make_subclass(LiveMask, mask.clone())
        live.current = mask
        return live

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*_plain(args), **_plain(kwargs or {}))


def _plain(value: Any) -> Any:
    if isinstance(value, LiveMask):
        return value.current
    if isinstance(value, (tuple, list)):
        return type(value)(_plain(item) for item in value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


@dataclass
class Planes:
    """Features that the decoder adds to visual columns after its first layers.

    Attributes:
        mask: `[B, T]` the mask that the decoder was given in place of its own.
        full: Its own.
        embeds: The list that the decoder was given: `[visual columns, D]` each, replaced at every cut.
        originals: Its own features.
    """

    mask: LiveMask
    full: Tensor
    embeds: list[Tensor]
    originals: list[Tensor]

    def cut(self, index: Tensor, alive: Tensor) -> None:
        """Makes mask and features those of the packed columns `index`, `alive` (`[B, K]`, CPU)."""
        full = self.full.cpu()
        rank = (full.flatten().cumsum(0) - 1).view(full.shape)
        picked = full.gather(1, index) & alive
        rows = rank.gather(1, index)[picked]
        self.mask.current = picked.to(self.full.device)
        for i, original in enumerate(self.originals):
            self.embeds[i] = original.index_select(0, rows.to(original.device))


def own_planes(kwargs: dict[str, Any], shape: tuple[int, int]) -> tuple[Planes, dict[str, Any]] | None:
    """Replaces DeepStack arguments by copies that a cut may change.

    Args:
        kwargs: Arguments of the decoder.
        shape: `(B, T)` of the call.

    Returns:
        tuple: The planes and new arguments; None if there is not exactly one mask `[B, T]` and one list of tensors.
    """
    tensors = {n: v for n, v in kwargs.items() if isinstance(v, Tensor) and n != "attention_mask"}
    masks = {n: v for n, v in tensors.items() if v.dtype == torch.bool and v.shape == shape}
    lists = {n: v for n, v in kwargs.items() if isinstance(v, list) and v and all(isinstance(t, Tensor) for t in v)}
    if len(masks) != 1 or len(lists) != 1:
        return None
    mask_name, mask = next(iter(masks.items()))
    list_name, embeds = next(iter(lists.items()))
    planes = Planes(LiveMask.of(mask), mask, list(embeds), list(embeds))
    return planes, {**kwargs, mask_name: planes.mask, list_name: planes.embeds}
