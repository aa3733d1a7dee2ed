# SPDX-License-Identifier: Apache-2.0
"""Compact positions: kept tokens are renumbered 0, 1, 2, ... (option `positions="compact"` of methods).

Some methods' official code renumbers. By default a kept token keeps its position, decoding continues after the unpruned
length, and nothing here is used. A renumbered layer needs the rotation of lower positions. For prompt tokens it is
taken from the token that had this position. For later tokens the given rotation is turned back by the number of dropped
tokens, with the angle subtraction formulas for cos and sin, so the rotary module is not needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.transfer import to_device
from .gather import gather

NAMES = ("position_embeddings", "position_ids")


def sources(index: Tensor, real: Tensor) -> Tensor:
    """For each slot, the prompt position whose original position id is the slot's new one.

    Args:
        index: `[B, K]` kept prompt positions in order.
        real: `[B, T]` False for padding, which is not numbered.

    Returns:
        Tensor: `[B, K]`.
    """
    out = index.clone()
    for b, row in enumerate(index):
        unpadded = real[b].nonzero()[:, 0]
        tokens = real[b, row]
        out[b, tokens] = unpadded[: int(tokens.sum())]
    return out


@dataclass
class Shift:
    """Number of positions by which position ids are lowered, per sample.

    Attributes:
        count: `[B]` number of positions.
        cos, sin: `[B, 1, d]` cosine and sine of the rotation by that many positions.
    """

    count: Tensor
    cos: Tensor
    sin: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> Shift:
        """Applies `function` to each of the tensors, whose first dimension is the batch."""
        return Shift(function(self.count), function(self.cos), function(self.sin))

    def plus(self, other: Shift) -> Shift:
        """The sum of two shifts."""
        cos = self.cos * other.cos - self.sin * other.sin
        return Shift(self.count + other.count, cos, self.sin * other.cos + self.cos * other.sin)

    def apply(self, name: str, value: Any) -> Any:
        """Shifts an argument called `name`: position ids, or a rotation `(cos, sin)`."""
        if name == "position_ids":
            return None if value is None else value - to_device(self.count, value.device)[:, None]
        cos, sin = value
        c, s = to_device(self.cos, cos.device), to_device(self.sin, cos.device)
        turned = cos.float() * c + sin.float() * s, sin.float() * c - cos.float() * s
        return turned[0].to(cos.dtype), turned[1].to(sin.dtype)


def shift_of(rotation: tuple[Tensor, Tensor], real: Tensor, index: Tensor) -> Shift:
    """The shift of later tokens after a cut, from the rotations of all prompt positions.

    Args:
        rotation: `(cos, sin)`, `[B or 1, T, d]`.
        real: `[B, T]` False for padding.
        index: `[B, K]` kept prompt positions.

    Returns:
        Shift: By the number of tokens that each sample lost.
    """
    cos, sin = (x.float() for x in rotation)
    lost = real.sum(1) - torch.stack([real[b, row.unique()].sum() for b, row in enumerate(index)])
    first = real.long().argmax(1)
    at = torch.stack([real[b].nonzero()[:, 0][n] for b, n in enumerate(lost)])  # the token `lost` positions later
    places = to_device(torch.stack([first, at], 1), cos.device)
    c, s = gather(cos, places, 1), gather(sin, places, 1)
    c, s = c.expand(len(lost), -1, -1), s.expand(len(lost), -1, -1)
    scale = (c[:, :1] ** 2 + s[:, :1] ** 2).clamp(min=1e-12)  # scaled rotary embeddings include a factor
    turn = (c[:, 1:] * c[:, :1] + s[:, 1:] * s[:, :1]) / scale, (s[:, 1:] * c[:, :1] - c[:, 1:] * s[:, :1]) / scale
    return Shift(to_device(lost, cos.device), *turn)
