# SPDX-License-Identifier: Apache-2.0
"""`Tokens` without a model, made from given queries, keys and values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vtprune.methods import AttentionInputs, Tokens


@dataclass
class Sample:
    """One prompt, text and visual, as one decoder layer sees it.

    Attributes:
        queries: `[H, T, dh]` of the query rows, the last rows of the prompt.
        keys: `[G, C, dh]` of the whole prompt.
        values: `[G, C, dv]`.
        start: First visual column.
        count: Visual tokens.
        rotated_keys: `[G, C, dh]`, by default `keys`.
        rotated_queries: `[H, T, dh]`, by default `queries`.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    start: int
    count: int
    rotated_keys: Tensor | None = None
    rotated_queries: Tensor | None = None


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def tokens(samples: list[Sample], budgets: list[int], image: Tensor | None = None) -> Tokens:
    """`Tokens` of a batch whose pools are the samples; `hidden` is zero."""

    def read(_tokens: Tokens, _layer: int, rope: bool, which: str) -> AttentionInputs:
        keys, queries, orders, visual, base = [], [], [], [], 0
        for s in samples:
            k = s.rotated_keys if rope and s.rotated_keys is not None else s.keys
            q = s.rotated_queries if rope and s.rotated_queries is not None else s.queries
            rows = q.shape[1] if which == "text" else 1
            keys.append(k.transpose(0, 1))  # [C, G, dh]
            queries.append(q[:, -rows:].transpose(0, 1))  # [T, H, dh]
            orders.append(torch.arange(k.shape[1] - rows, k.shape[1]))
            visual.append(base + s.start + torch.arange(s.count))
            base += k.shape[1]
        return AttentionInputs(
            queries=torch.cat(queries),
            query_offsets=offsets([len(q) for q in queries]),
            query_order=torch.cat(orders),
            keys=torch.cat(keys),
            values=torch.cat([s.values.transpose(0, 1) for s in samples]),
            key_offsets=offsets([len(k) for k in keys]),
            visual=torch.cat(visual),
            scaling=samples[0].keys.shape[-1] ** -0.5,
        )

    counts = torch.tensor([s.count for s in samples])
    total = int(counts.sum())
    sample = torch.repeat_interleave(torch.arange(len(samples)), counts)
    index = torch.cat([torch.arange(s.count) for s in samples])
    zeros = torch.zeros(total, dtype=torch.int64)
    return Tokens(
        hidden=torch.zeros(total, 1),
        offsets=offsets(counts.tolist()),
        budgets=torch.tensor(budgets),
        originals=counts,
        sample=sample,
        image=sample if image is None else image,
        frame=zeros,
        crop=zeros,
        grid_row=zeros,
        grid_col=index,
        index=index,
        feature=index,
        position=index + torch.tensor([s.start for s in samples])[sample],
        layer=2,
        stage=0,
        num_layers=8,
        reader=read,
    )
