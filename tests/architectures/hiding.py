# SPDX-License-Identifier: Apache-2.0
"""Masked reference of a pruned call for unpatched models with any type of layer.

Attention layers keep all columns and the model's own mask (sliding windows, bidirectional pictures), in which the
dropped columns are masked too. Recurrent and convolutional layers have no such mask; decoders with any of them run on
the shortened sequence from the cut on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def mixes_without_mask(layer: nn.Module) -> bool:
    """Whether a layer mixes columns by a convolution or a recurrent state, which no attention mask affects."""
    return any(
        isinstance(m, nn.Conv1d) or re.search("mamba|deltanet|shortconv", type(m).__name__.lower())
        for m in layer.modules()
    )


@contextmanager
def eager(decoder: nn.Module) -> Iterator[None]:
    """Switches the decoder to eager attention inside the block, so that every mask is explicit."""
    configs = {id(m.config): m.config for m in decoder.modules() if hasattr(m, "config")}
    before = {key: config._attn_implementation for key, config in configs.items()}
    for config in configs.values():
        config._attn_implementation_internal = "eager"
    try:
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = before[key]


@contextmanager
def hidden(layers: nn.ModuleList, cuts: list[tuple[int, list[Tensor]]]) -> Iterator[None]:
    """Masks dropped columns in the layers' attention inside the block.

    Args:
        layers: Layers of an unpatched decoder with eager attention.
        cuts: `(layer, dropped columns per sample)`, cumulative.
    """

    def hook_for(number: int) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            states = args[0] if args else kwargs["hidden_states"]
            batch, queries = states.shape[:2]
            cache = next((v for v in kwargs.values() if hasattr(v, "get_mask_sizes")), None)
            past = int(cache.get_seq_length(number)) if cache is not None and number < len(cache.layers) else 0
            layer = cache.layers[number] if past else None
            total = past + queries
            gone = torch.zeros(batch, total, dtype=torch.bool)
            for start, columns in cuts:
                if start <= number:
                    for row in range(batch):  # beams of a sample are consecutive rows
                        here = columns[row * len(columns) // batch]
                        gone[row, here[here < total]] = True  # guidance also runs on a shorter prompt

            def hide(x: Any) -> Any:
                if cache is None and isinstance(x, Tensor) and x.dim() == 4 and x.shape[2] == queries < x.shape[3]:
                    x = x[..., :total]  # padding mask of ones, longer than the keys
                if not (
                    isinstance(x, Tensor) and x.dim() == 4 and x.shape[2] == queries and queries <= x.shape[3] <= total
                ):
                    return x
                seen = _held(layer, total, x.shape[3])
                own = torch.eye(total, dtype=torch.bool)[past:, seen]
                blocked = gone[:, None, None, seen] & ~own
                return x & ~blocked if x.dtype == torch.bool else x.masked_fill(blocked, torch.finfo(x.dtype).min)

            hidden_args, hidden_kwargs = tuple(map(hide, args)), {k: hide(v) for k, v in kwargs.items()}
            if kwargs.get("attention_mask", 0) is None:
                causal = torch.ones(queries, total, dtype=torch.bool).tril(past).expand(batch, 1, -1, -1)
                mask = torch.zeros(causal.shape).masked_fill(~causal, torch.finfo(torch.float32).min)
                hidden_kwargs["attention_mask"] = hide(mask)
            return hidden_args, hidden_kwargs

        return hook

    handles = [layer.register_forward_pre_hook(hook_for(i), with_kwargs=True) for i, layer in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _held(layer: Any, total: int, seen: int) -> Tensor:
    """Columns `[seen]` in a layer's cache: a sliding window has dropped the first ones, except those of the prompt in
    some models."""
    prompt = min(getattr(layer, "prefill_length", None) or 0, seen)
    return torch.cat([torch.arange(prompt), torch.arange(total - seen + prompt, total)])


@contextmanager
def shortened(layers: nn.ModuleList, cut: int, gone: Tensor) -> Iterator[None]:
    """Removes the columns `gone` (one sample) from layer `cut` on, including everything after the layers."""
    length, kept = 0, torch.empty(0, dtype=torch.long)

    def take(x: Any) -> Any:
        if isinstance(x, (tuple, list)):
            return type(x)(take(item) for item in x)
        if isinstance(x, dict):
            return {key: take(item) for key, item in x.items()}
        if not isinstance(x, Tensor):
            return x
        if x.dim() == 4 and x.shape[-2:] == (length, length):
            return x[..., kept, :][..., kept]
        for dim in (1, 2, 0):
            if x.dim() > dim and x.shape[dim] == length and (dim != 0 or x.dim() == 1):
                return x.index_select(dim, kept)
        return x

    def hook_for(number: int) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            nonlocal length, kept
            states = args[0] if args else kwargs["hidden_states"]
            if number == cut:
                length = states.shape[1]
                columns = torch.arange(length)
                kept = columns[~torch.isin(columns, gone)]
                states = take(states)
            rest = {k: take(v) for k, v in kwargs.items() if k != "hidden_states"}
            return ((states, *take(args[1:])), rest) if args else ((), {"hidden_states": states, **rest})

        return hook

    handles = [
        layer.register_forward_pre_hook(hook_for(i), with_kwargs=True) for i, layer in enumerate(layers) if i >= cut
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
