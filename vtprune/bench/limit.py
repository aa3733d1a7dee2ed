# SPDX-License-Identifier: Apache-2.0
"""Lower bounds of the time of a pruned prefill: a prompt that has only the kept tokens, and a count of operations."""

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
    """Captures the input of the unpruned model's decoder for a prompt: text and visual embeddings `[B, T, D]`.

    Args:
        parts: Anatomy of the model, which must be unpatched or have a paused patch.
        inputs: Arguments of `generate`.
    """
    seen: list[Tensor] = []

    class Captured(Exception):
        pass

    def capture(module: Any, args: tuple, kwargs: dict) -> None:
        seen.append(kwargs["inputs_embeds"] if kwargs.get("inputs_embeds") is not None else args[0])
        raise Captured

    handle = parts.decoder.register_forward_pre_hook(capture, with_kwargs=True)
    model: Any = parts.model
    try:
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
    except Captured:
        pass
    finally:
        handle.remove()
    if not seen or seen[0].dim() != 3:
        raise VTPruneError(
            f"{type(parts.decoder).__name__} gets no [batch, length, width] embeddings, so its limit cannot be measured"
        )
    return seen[0]


def short_prompt(embeds: Tensor, visual: Tensor, budget: Budget) -> dict[str, Tensor]:
    """Removes visual tokens from a prompt until `budget` evenly spaced ones remain.

    Args:
        embeds: `[B, T, D]` embeddings of the full prompt.
        visual: `[B, T]` bool, True at visual tokens; the same number in every sample.
        budget: `ratio` or `keep`.

    Returns:
        dict: `inputs_embeds` `[B, T', D]` and `attention_mask` `[B, T']`, arguments of `generate`.
    """
    kept = ~visual
    for row in range(len(visual)):
        positions = visual[row].nonzero()[:, 0]
        count = tokens_left(budget, len(positions))
        kept[row, positions[torch.arange(count, device=positions.device) * len(positions) // count]] = True
    length = int(kept[0].sum())
    short = embeds[kept].view(len(visual), length, -1)
    return {"inputs_embeds": short, "attention_mask": torch.ones(short.shape[:2], dtype=torch.long).to(short.device)}


def tokens_left(budget: Budget, tokens: int) -> int:
    """Number of `tokens` visual tokens that a `ratio` or `keep` keeps."""
    if budget.keep is not None:
        return min(budget.keep, tokens)
    assert budget.share is not None
    return min(tokens, max(1, round(budget.share * tokens)))


def flops_share(slots: Sequence[int], length: int, shape: DecoderShape) -> float:
    """Decoder FLOPs of a pruned prefill relative to the unpruned one, text included, counted as the papers do.

    Args:
        slots: Number of tokens that each decoder layer ran on.
        length: Number of tokens of the prompt.
        shape: Sizes of the decoder.
    """
    return decoder_flops(slots, shape) / decoder_flops([length] * shape.layers, shape)
