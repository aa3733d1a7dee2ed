# SPDX-License-Identifier: Apache-2.0
"""Generations without a cache: every step is a prefill, and keeps the tokens of the first one."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..models.arguments import map_tensors
from ..models.transformers_names import ENCODER_OUTPUTS
from .call import CallState, Selection

_MOST = 4  # generations that are known at a time, because others may run between two steps


@dataclass
class Fingerprint:
    """Pixels or features that a call was given, and a checksum: programs write other pictures into the same memory."""

    tensor: weakref.ref
    checksum: float

    @classmethod
    def of(cls, tensor: Tensor) -> Fingerprint:
        values = tensor.detach().flatten()
        dtype = torch.float32 if values.device.type == "mps" else torch.float64  # MPS has no float64
        places = torch.arange(1, len(values) + 1, device=values.device, dtype=dtype)
        return cls(weakref.ref(tensor), float((values * places).sum()))

    def is_same(self, other: Fingerprint) -> bool:
        """Whether both are the same tensor with the same content."""
        return self.tensor() is other.tensor() and self.checksum == other.checksum


@dataclass
class Generation:
    """A generation without a cache.

    Attributes:
        ids: `[B, T]` prompt of its first step.
        sources: Pixels or features of its pictures.
        selections: What was selected in its first step.
        length: Tokens of its last step.
    """

    ids: Tensor
    sources: list[Fingerprint]
    selections: list[Selection]
    length: int

    def continues(self, ids: Tensor, sources: list[Fingerprint]) -> bool:
        """Whether a prompt is the next step: one more token, beams in any order, and the same feature tensors."""
        if len(ids) != len(self.ids) or ids.shape[1] != self.length + 1 or len(sources) != len(self.sources):
            return False
        same = all(a.is_same(b) for a, b in zip(sources, self.sources, strict=True))
        return same and torch.equal(ids[:, : self.ids.shape[1]], self.ids)


class Generations:
    """The last generations without a cache in one thread, the newest last."""

    def __init__(self) -> None:
        self._known: list[Generation] = []

    def follow(self, call: CallState, inputs: dict[str, Any]) -> list[Selection] | None:
        """The selections that a call without a cache takes over from the first step of its generation, or None.

        Args:
            call: The call, whose own selections are kept for later steps if it begins a generation.
            inputs: Keyword arguments of the composite.
        """
        ids = call.inputs.get("input_ids")
        given = [inputs[name] for name in sorted(inputs) if name.startswith("pixel")]
        given += [list(x.values()) if isinstance(x, dict) else x for x in (inputs.get(ENCODER_OUTPUTS) or {}).values()]
        sources: list[Fingerprint] = []
        map_tensors(given, lambda tensor: sources.append(Fingerprint.of(tensor)))
        if ids is None or not sources:
            return None
        for number, generation in enumerate(self._known):
            if generation.continues(ids, sources):
                self._known.append(self._known.pop(number))
                generation.length = ids.shape[1]
                return generation.selections
        # The call appends to `selections` while it runs.
        self._known = [*self._known[1 - _MOST :], Generation(ids.clone(), sources, call.selections, ids.shape[1])]
        return None
