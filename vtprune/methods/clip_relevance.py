# SPDX-License-Identifier: Apache-2.0
"""How close patches are to a text in the space of a CLIP model (CDPruner, arXiv 2506.10967)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..errors import MethodError

_SEGMENT = 77  # tokens that CLIP's text tower reads at once


def similarity(image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
    """Mean over the text rows of the NEGATIVE cosine, as released (dense CLIP patches are anti-correlated with text).

    Args:
        image_embeds: `[..., C]`.
        text_embeds: `[m, C]`.

    Returns:
        Tensor: `[...]` float32.
    """
    return -(normalize(image_embeds.float(), dim=-1) @ normalize(text_embeds.float(), dim=-1).mean(0))


def clip_patches(clip: Any, features: Tensor) -> Tensor:
    """`[R, C]` CLIP embeddings of patches `[R, F]`, the vision tower's features before the projector.

    Raises:
        MethodError: The features are not as wide as those of the CLIP model `clip`.
    """
    weights = clip.visual_projection.weight
    if features.shape[1] != weights.shape[1]:
        raise MethodError(
            f"clip projects features of width {weights.shape[1]}, the model's are {features.shape[1]} wide; "
            "expected the CLIP model that the vision tower was taken from"
        )
    return clip.visual_projection(clip.vision_model.post_layernorm(features.to(weights)))


def clip_text(clip: Any, clip_tokenizer: Any, text: str) -> Tensor:
    """`[m, C]` CLIP embeddings of a text, one for every 77 tokens of it."""
    tokens = torch.tensor(clip_tokenizer(text.strip())["input_ids"])
    segments = tokens.new_zeros(-(-len(tokens) // _SEGMENT), _SEGMENT)
    segments.view(-1)[: len(tokens)] = tokens
    output = clip.get_text_features(input_ids=segments.to(clip.device))
    return output if isinstance(output, Tensor) else output.pooler_output
