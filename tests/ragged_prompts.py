# SPDX-License-Identifier: Apache-2.0
"""A ragged batch of prompts without a model: text, pictures, attention inputs of one layer, recorded tap values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vtprune.core.tokens import Prompt
from vtprune.methods import AttentionInputs, Tokens

WIDTH, HEADS, GROUPS, SIZE = 12, 6, 2, 8


@dataclass
class Sample:
    """A prompt of `before` text tokens, a `rows` x `cols` picture and `after` text tokens, as one layer sees it."""

    before: int
    rows: int
    cols: int
    after: int
    states: Tensor  # [C, D]
    queries: Tensor  # [C, H, dh]
    keys: Tensor  # [C, G, dh]
    changes: Tensor  # [C, 2]

    @property
    def count(self) -> int:
        return self.rows * self.cols

    @property
    def length(self) -> int:
        return self.before + self.count + self.after


def sample(seed: int, before: int, rows: int, cols: int, after: int) -> Sample:
    g = torch.Generator().manual_seed(seed)
    length = before + rows * cols + after
    states, queries, keys = (
        torch.randn(length, *shape, generator=g) for shape in ((WIDTH,), (HEADS, SIZE), (GROUPS, SIZE))
    )
    return Sample(before, rows, cols, after, states, queries, keys, torch.rand(length, 2, generator=g))


RAGGED = [sample(1, 3, 4, 5, 6), sample(2, 1, 7, 7, 2), sample(3, 5, 1, 3, 0), sample(4, 2, 6, 2, 9)]
BUDGETS = [7, 20, 2, 11]


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def tokens(samples: list[Sample], budgets: list[int], left: bool = True, layer: int = 2, stage: int = 0) -> Tokens:
    """`Tokens` of the batch; recorded tap values are padded to equal lengths."""
    longest = max(s.length for s in samples) + 2
    starts = [longest - s.length if left else 0 for s in samples]
    visual = [torch.arange(s.count) + s.before for s in samples]
    text = [torch.arange(s.length)[-max(s.after, 1) :] for s in samples]
    base = offsets([s.length for s in samples])

    def padded(name: str) -> Tensor:
        parts = [getattr(s, name) for s in samples]
        out = torch.full((len(samples), longest, *parts[0].shape[1:]), 1e4)  # padding must not be read
        for b, (part, start) in enumerate(zip(parts, starts, strict=True)):
            out[b, start : start + len(part)] = part
        return out

    def read(_: Tokens, layer: int, rope: bool, which: str) -> AttentionInputs:
        rows = text if which == "text" else [t[-1:] for t in text]
        return AttentionInputs(
            queries=torch.cat([s.queries[r] for s, r in zip(samples, rows, strict=True)]),
            query_offsets=offsets([len(r) for r in rows]),
            query_order=torch.cat(rows),
            keys=torch.cat([s.keys for s in samples]),
            values=torch.cat([s.keys for s in samples]),
            key_offsets=base,
            visual=torch.cat([v + b for v, b in zip(visual, base[:-1], strict=True)]),
            scaling=SIZE**-0.5,
        )

    number = torch.cat([torch.full((s.count,), b) for b, s in enumerate(samples)])
    index = torch.cat([torch.arange(s.count) for s in samples])
    cols = torch.tensor([s.cols for s in samples])[number]
    return Tokens(
        hidden=torch.cat([s.states[v] for s, v in zip(samples, visual, strict=True)]),
        offsets=offsets([s.count for s in samples]),
        budgets=torch.tensor(budgets),
        originals=torch.tensor([s.count for s in samples]),
        sample=number,
        image=number,
        frame=torch.zeros_like(number),
        crop=torch.zeros_like(number),
        grid_row=index // cols,
        grid_col=index % cols,
        index=index,
        feature=torch.arange(len(index)),
        position=index + torch.tensor([s.before + start for s, start in zip(samples, starts, strict=True)])[number],
        layer=layer,
        stage=stage,
        num_layers=8,
        recorded={
            "dart.states": [padded("states")],
            "sparsevlm.embeddings": [padded("states")],
            "transprune.change": [padded("changes"), padded("changes") * 0.5],
        },
        prompt=Prompt(
            batch=torch.cat([torch.full((s.length,), b) for b, s in enumerate(samples)]),
            slot=torch.cat([torch.arange(s.length) + start for s, start in zip(samples, starts, strict=True)]),
            offsets=base,
            visual=torch.cat([v + b for v, b in zip(visual, base[:-1], strict=True)]),
            text=torch.cat([t + b for t, b in zip(text, base[:-1], strict=True)]),
            text_offsets=offsets([len(t) for t in text]),
        ),
        reader=read,
    )
