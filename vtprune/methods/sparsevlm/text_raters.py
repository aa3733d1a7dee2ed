# SPDX-License-Identifier: Apache-2.0
"""Raters of SparseVLM (arXiv 2410.04417): the text tokens of the instruction that relate to the image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core.taps import layer_input, mean_of_streams, over_prompt
from ...core.tokens import Tokens


def rater_scores(visual: Tensor, text: Tensor) -> Tensor:
    """Relation of each text token to the image: softmax over the text of `visual text^T`, mean over the image.

    Args:
        visual: `[n, D]` input embeddings of the visual tokens.
        text: `[t, D]` input embeddings of the text after them.

    Returns:
        Tensor: `[t]` float32, sums to 1.
    """
    return torch.softmax(visual.float() @ text.float().T, dim=-1).mean(0)


def raters(scores: Tensor) -> Tensor:
    """`[t]` bool: text tokens above the mean; all of them where none is."""
    above = scores > scores.mean()
    return above if bool(above.any()) else torch.ones_like(above)


def embeddings(args: tuple, kwargs: dict[str, Any], output: Any) -> Tensor | None:
    """`[B, T, D]` input embeddings, for a tap on the first decoder layer; None at decoding steps."""
    states = layer_input(args, kwargs, output)
    return states if states.shape[1] > 1 else None


def find_raters(record: Tensor, tokens: Tokens) -> Tensor:
    """Finds the raters in the text after the image of every sample.

    Args:
        record: `[B, T, D]` from `embeddings`.
        tokens: Tokens of the current stage, with a prompt.

    Returns:
        Tensor: `[R]` bool, in the order of `tokens.prompt.text`.
    """
    states, prompt = mean_of_streams(over_prompt(record, tokens), tokens.hidden.shape[1]), tokens.prompt  # [C, D]
    assert prompt is not None
    visual = states[prompt.visual].split(tokens.offsets.diff().tolist())
    text = states[prompt.text].split(prompt.text_offsets.diff().tolist())
    return torch.cat([raters(rater_scores(v, t)) for v, t in zip(visual, text, strict=True)])
