# SPDX-License-Identifier: Apache-2.0
"""The reference for "drop is mask": an unpatched model whose layers cannot attend to dropped tokens.

Independent of the engine: it keeps every column, builds each layer's mask from scratch, and takes from the pruned run
only which columns were dropped before which layer (and, for merging methods, the new states of kept columns).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Drops:
    """What a pruned prefill dropped.

    Attributes:
        cuts: `(layer, dropped columns per sample)`, cumulative: each lists all columns missing from that layer on.
        merged: `layer -> (rows, columns, states)` that replaced hidden states before that layer.
    """

    cuts: list[tuple[int, list[Tensor]]] = field(default_factory=list)
    merged: dict[int, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, last: Any) -> Drops:
        cuts = []
        for layer, kept in last.stages:
            gone = [v[~torch.isin(v, k)] for v, k in zip(last.visual, kept, strict=True)]
            cuts.append((layer, gone))
        return cls(cuts)

    def mask(self, layer: int, batch: int, length: int) -> Tensor:
        """`[batch, length]` True where the column is hidden from `layer`. Samples repeat in blocks (beams)."""
        hidden = torch.zeros(batch, length, dtype=torch.bool)
        for start, gone in self.cuts:
            if start <= layer:
                repeat = batch // len(gone)
                for row in range(batch):
                    columns = gone[row // repeat]
                    hidden[row, columns[columns < length]] = True
        return hidden


@contextmanager
def masked(layers: nn.ModuleList, drops: list[Drops], attention_mask: Tensor | None = None) -> Iterator[None]:
    """Context in which decoder layers cannot attend to the columns of `drops`.

    Args:
        layers: Decoder layers of an unpatched model.
        drops: One entry per pruned prefill of the conversation.
        attention_mask: `[B, T]` padding of the prompt; later columns are real.
    """
    handles = []

    def hook_for(number: int) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            hidden = args[0] if args else kwargs["hidden_states"]
            batch, queries = hidden.shape[:2]
            cache = next((v for v in kwargs.values() if hasattr(v, "get_mask_sizes")), None)
            past = int(cache.get_seq_length(number)) if cache is not None else 0
            total = past + queries
            for drop in drops:
                if number in drop.merged and past <= drop.merged[number][1].min() < past + queries:
                    rows, columns, states = drop.merged[number]
                    hidden = hidden.clone()
                    hidden[rows, columns - past] = states.to(hidden.dtype)
            allowed = torch.ones(queries, total, dtype=torch.bool).tril(past).expand(batch, -1, -1).clone()
            if attention_mask is not None:
                real = torch.ones(batch, total, dtype=torch.bool)
                repeat = batch // attention_mask.shape[0]
                known = attention_mask.bool().repeat_interleave(repeat, 0)[:, :total]
                real[:, : known.shape[1]] = known
                allowed &= real[:, None]
            for drop in drops:
                allowed &= ~drop.mask(number, batch, total)[:, None]
            # Padding columns at the left attend to nothing; each attends to itself, so that no mask row is empty.
            empty = ~allowed.any(-1, keepdim=True)
            allowed |= empty & torch.eye(total, dtype=torch.bool)[past:]
            mask = torch.zeros(allowed.shape, dtype=hidden.dtype).masked_fill(~allowed, torch.finfo(hidden.dtype).min)
            kwargs = {**kwargs, "attention_mask": mask[:, None]}
            return (hidden, *args[1:]), kwargs

        return hook

    for number, layer in enumerate(layers):
        handles.append(layer.register_forward_pre_hook(hook_for(number), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
