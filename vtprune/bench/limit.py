# SPDX-License-Identifier: Apache-2.0
"""What pruning is measured against: a prompt of only the kept tokens from the start, and a count of operations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.budget import Budget
from ..errors import VTPruneError
from ..models.anatomy import Anatomy
from ..report.cost import DecoderShape, decoder_flops


@torch.no_grad()
def embedded_prompt(parts: Anatomy, inputs: Mapping[str, Any]) -> Tensor:
    """What the unpruned model's decoder is given for a prompt: text and visual embeddings `[B, T, D]`.

    Args:
        parts: Anatomy of the model, which must not be patched, or whose patch is paused.
        inputs: Arguments of `generate`.
    """
    seen: list[Tensor] = []

    class Enough(Exception):
        pass

    def look(module: Any, args: tuple, kwargs: dict) -> None:
        seen.append(kwargs["inputs_embeds"] if kwargs.get("inputs_embeds") is not None else args[0])
        raise Enough

    handle = parts.decoder.register_forward_pre_hook(look, with_kwargs=True)
    model: Any = parts.model
    try:
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
    except Enough:
        pass
    finally:
        handle.remove()
    if not seen or seen[0].dim() != 3:
        raise VTPruneError(f"{type(parts.decoder).__name__} is not given embeddings: its limit cannot be measured")
    return seen[0]


def short_prompt(embeds: Tensor, visual: Tensor, budget: Budget) -> dict[str, Tensor]:
    """The prompt that had only `budget` of its visual tokens from the start, evenly spaced ones.

    Args:
        embeds: `[B, T, D]` of the full prompt.
        visual: `[B, T]` bool, its visual columns; the same number in every sample.
        budget: `ratio` or `keep`.

    Returns:
        dict: `inputs_embeds` `[B, T', D]` and `attention_mask` `[B, T']`, arguments of `generate`.
    """
    stays = ~visual
    for row in range(len(visual)):
        columns = visual[row].nonzero()[:, 0]
        count = left(budget, len(columns))
        stays[row, columns[torch.arange(count, device=columns.device) * len(columns) // count]] = True
    length = int(stays[0].sum())
    short = embeds[stays].view(len(visual), length, -1)
    return {"inputs_embeds": short, "attention_mask": torch.ones(short.shape[:2], dtype=torch.long).to(short.device)}


def left(budget: Budget, tokens: int) -> int:
    """How many of `tokens` visual tokens a `ratio` or `keep` leaves."""
    if budget.keep is not None:
        return min(budget.keep, tokens)
    assert budget.share is not None
    return min(tokens, max(1, round(budget.share * tokens)))


def flops_share(slots: Sequence[int], length: int, shape: DecoderShape) -> float:
    """Operations of a pruned prefill as a share of the unpruned one's, text included, counted as the papers do.

    Args:
        slots: Columns that each decoder layer ran on.
        length: Columns of the prompt.
        shape: Sizes of the decoder.
    """
    return decoder_flops(slots, shape) / decoder_flops([length] * shape.layers, shape)
