# SPDX-License-Identifier: Apache-2.0
"""What a pruned decoder returns, scattered to all positions of the call."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..core.transfer import to_device
from ..errors import UnsupportedModelError
from . import gather, kv_cache
from .columns import Columns


@dataclass
class FullLength:
    """Scatters what the layers of a call return to all positions of the call; dropped ones are zero.

    Attributes:
        columns: The positions that each layer ran on.
        inputs: States at all positions that some layers would have got, where gradients of them may be requested.
    """

    columns: Columns
    inputs: dict[int, Tensor] = field(default_factory=dict)

    def restore(self, output: Any) -> Any:
        """Scatters a decoder's output.

        Hidden states become `[B, T, D]`, attention maps `[B, H, T, past + T]`, router logits `[B * T, E]`.
        """
        if isinstance(output, Tensor):
            return self._states(output, -1)
        if isinstance(output, tuple):
            return (self._states(output[0], -1), *map(self._group, output[1:]))
        last = output.last_hidden_state
        output.last_hidden_state = self._states(last, -1)
        for name in ("hidden_states", "attentions", "router_logits"):
            group = getattr(output, name, None)
            if isinstance(group, (tuple, list)):
                full = self._group(group)
                if name == "hidden_states" and group and group[-1] is last:
                    full = (*full[:-1], output.last_hidden_state)
                setattr(output, name, full)
        return output

    def through(self, number: int, hidden: Tensor) -> Tensor:
        """Scatters hidden states `[B, K, D]` to all positions and gathers them again, so that the full-length input of
        layer `number`, which the caller gets, is part of the autograd graph."""
        index, valid = (to_device(x, hidden.device) for x in (self.columns.index, self.columns.valid))
        self.inputs[number] = gather.scatter(hidden, index, valid, self.columns.length)
        return gather.gather(self.inputs[number], index, 1)

    def _group(self, group: Any) -> Any:
        """Restores hidden states (one more than layers), attention maps or router logits, recognized by their shape."""
        if not isinstance(group, (tuple, list)) or not any(isinstance(x, Tensor) for x in group):
            return group
        dims = next(x.dim() for x in group if isinstance(x, Tensor))
        if dims == 3 or len(group) == self.columns.layers + 1:  # hyper-connections have several streams, [B, T, S, D]
            # Entry 0 is the input of the first layer, entry i the output of layer i - 1.
            full = (None if h is None else self._states(h, max(i - 1, 0)) for i, h in enumerate(group))
            return tuple(self.inputs.get(i, h) for i, h in enumerate(full))
        layers = self._layers_of(group, dims)
        scatter = self._attention if dims == 4 else self._router_logits
        return tuple(x if x is None else scatter(x, layer) for x, layer in zip(group, layers, strict=True))

    def _layers_of(self, group: Any, dims: int) -> list[int]:
        """The layer of each entry; decoders with several kinds of layers return entries for some layers only."""
        columns, counts = self.columns, self.columns.slot_counts
        if len(group) == columns.layers:
            return list(range(len(group)))
        layers: list[int] = []
        for x in group:
            start = layers[-1] + 1 if layers else 0
            queries = (x.shape[2] if dims == 4 else x.shape[0] // columns.batch) if isinstance(x, Tensor) else None
            layers.append(next((i for i in range(start, len(counts)) if counts[i] == queries), start))
        if layers and layers[-1] >= len(counts):
            raise UnsupportedModelError(
                f"the decoder returned {len(group)} attention maps or router logits for {len(counts)} layers, and it "
                "is unknown which layers they belong to; request them inside patch.paused()"
            )
        return layers

    def _states(self, x: Tensor, layer: int) -> Tensor:
        """Scatters `[B, K, ...]` to `[B, T, ...]`; -1 is the last layer."""
        columns = self.columns
        if not columns.is_cut:
            return x
        index, valid = columns.layout_of(layer)
        if x.dim() < 3 or x.shape[1] != index.shape[1]:
            return x
        whole = bool(valid.all()) if layer >= 0 else not columns.ragged
        if whole and index.shape[1] == columns.length:
            return x
        return gather.scatter(
            x, to_device(index, x.device), None if whole else to_device(valid, x.device), columns.length
        )

    def _router_logits(self, x: Tensor, layer: int) -> Tensor:
        """Scatters `[B * K, E]` to `[B * T, E]`."""
        return self._states(x.unflatten(0, (self.columns.batch, -1)), layer).flatten(0, 1)

    def _attention(self, x: Tensor, layer: int) -> Tensor:
        """Scatters an attention map `[B, H, q, k]` to `[B, H, T, past + T]`."""
        columns, keys = self.columns, x.shape[-1]
        layout, stored = columns.layout_of(layer), kv_cache.cached_tokens(columns.cache, layer)
        # -1 for slots that must not be attended to.
        slots = columns.slot_positions(layer, stored - layout[0].shape[1], layout)
        # A sliding window attends to the last slots only; a static cache includes empty slots.
        slots = nn.functional.pad(slots, (0, max(keys - slots.shape[1], 0)), value=-1)
        prompt = kv_cache.lasting_prompt(columns.cache, layer)
        slots = to_device(kv_cache.slots_attended(slots, prompt, slots.shape[1] - keys, keys), x.device)
        x = gather.scatter(x.movedim(3, 1), slots.clamp(min=0), slots >= 0, columns.past + columns.length)
        return self._states(x.movedim(1, 3).transpose(1, 2), layer).transpose(1, 2)
