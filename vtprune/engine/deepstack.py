# SPDX-License-Identifier: Apache-2.0
"""DeepStack: visual features that a decoder adds to its visual tokens between its first layers (Qwen3-VL)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.transfer import to_device
from . import hooks


class RedirectingMask(Tensor):
    """A mask passed to the decoder once, whose operations use another mask, `current`, after every cut.

    It is not changed in place, because autograd keeps the earlier masks.
    """

    current: Tensor

    @staticmethod
    def of(mask: Tensor) -> RedirectingMask:
        live = Tensor._make_subclass(RedirectingMask, mask.clone())
        live.current = mask
        return live

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*_plain(args), **_plain(kwargs or {}))


def _plain(value: Any) -> Any:
    if isinstance(value, RedirectingMask):
        return value.current
    if isinstance(value, (tuple, list)):
        return type(value)(_plain(item) for item in value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


class _LaterList(list):
    """List of features of which the decoder gets `rows`, selected on access.

    If they were selected at the cut, a layer that is run again in the backward pass (`checkpointing`) would hold them
    in its graph.
    """

    rows: Tensor | None = None

    def __getitem__(self, key: Any) -> Any:
        return _picked(super().__getitem__(key), self.rows)


class _LaterDict(dict):
    """`_LaterList` for features in a dict by layer."""

    rows: Tensor | None = None

    def __getitem__(self, key: Any) -> Any:
        return _picked(super().__getitem__(key), self.rows)

    def get(self, key: Any, default: Any = None) -> Any:
        found = super().get(key, default)
        return _picked(found, self.rows) if isinstance(found, Tensor) else found


def _picked(features: Tensor, rows: Tensor | None) -> Tensor:
    return features if rows is None else features.index_select(0, to_device(rows, features.device))


@dataclass
class DeepStackFeatures:
    """Features that the decoder adds to visual tokens around its first layers, and the mask of these tokens.

    Attributes:
        mask: `[B, T]` or `[B, T, 1]` mask passed to the decoder instead of `full`. Compiled code cannot trace a
            `RedirectingMask` and gets a plain tensor, whose data every cut replaces. Autograd refers to that tensor, so
            the backward pass through a compiled, pruned decoder with DeepStack fails.
        full: The original mask.
        embeds: List, or dict by layer, of features `[visual tokens, D]` passed to the decoder, replaced at every cut.
        originals: The original features.
    """

    mask: Tensor
    full: Tensor
    embeds: Any
    originals: Any

    def cut(self, index: Tensor, valid: Tensor) -> None:
        """Cuts mask and features to the packed layout `index`, `valid` (`[B, K]`, CPU)."""
        full = self.full.cpu().flatten(1)  # [B, T]
        rank = (full.flatten().cumsum(0) - 1).view(full.shape)
        picked = full.gather(1, index) & valid
        rows = rank.gather(1, index)[picked]
        now = picked.view(*picked.shape, *self.full.shape[2:]).to(self.full.device)
        if isinstance(self.mask, RedirectingMask):
            self.mask.current = now
        else:
            self.mask.data = now
        if isinstance(self.embeds, (_LaterList, _LaterDict)):
            self.embeds.rows = rows
            return
        for key, original in _items(self.originals):
            self.embeds[key] = _picked(original, rows)


def _items(features: Any) -> list[tuple[Any, Any]]:
    return list(features.items() if isinstance(features, dict) else enumerate(features))


def intercept_deepstack(
    kwargs: dict[str, Any], shape: tuple[int, int], later: bool
) -> tuple[DeepStackFeatures, dict[str, Any]] | None:
    """Replaces DeepStack arguments by copies that a cut may change.

    Args:
        kwargs: Arguments of the decoder.
        shape: `(B, T)` of the call.
        later: Whether features are selected on access instead of at the cut, see `_LaterList`.

    Returns:
        tuple: The features and the new arguments; None unless there is exactly one mask `[B, T]` or `[B, T, 1]` and one
        list, or dict by layer, of tensors.
    """
    tensors = {n: v for n, v in kwargs.items() if isinstance(v, Tensor) and n != "attention_mask"}
    masks = {n: v for n, v in tensors.items() if v.dtype == torch.bool and v.shape in (shape, (*shape, 1))}
    groups = {n: v for n, v in kwargs.items() if isinstance(v, (list, dict)) and v and n != "attention_mask"}
    groups = {n: v for n, v in groups.items() if all(isinstance(t, Tensor) for _, t in _items(v))}
    if len(masks) != 1 or len(groups) != 1:
        return None
    mask_name, mask = next(iter(masks.items()))
    name, features = next(iter(groups.items()))
    kinds = (_LaterDict, _LaterList) if later else (dict, list)
    copy = kinds[0](features) if isinstance(features, dict) else kinds[1](features)
    given = mask.clone() if hooks.called_by_compiled_code() else RedirectingMask.of(mask)
    deepstack = DeepStackFeatures(given, mask, copy, features)
    return deepstack, {**kwargs, mask_name: deepstack.mask, name: deepstack.embeds}
