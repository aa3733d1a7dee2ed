# SPDX-License-Identifier: Apache-2.0
"""SCOPE: selects salient tokens that cover the others."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from vtprune_kernels import facility_location

from ..core.method import Choice, Method, Stage, Tap
from ..core.options import AtLeastZero
from ..core.ragged import from_order
from ..core.registry import register
from ..core.tokens import Tokens
from ..vision.attention import Attention, has_class_token, layer_tap
from ..vision.tower import Vision, projector_tap

if TYPE_CHECKING:
    from ..models.anatomy import Anatomy


def class_saliency(attention: Attention) -> Tensor:
    """`[B, N]` attention of the class token, softmax over the patches of its crop, mean over heads; prefix 0."""
    query, key = attention.query[:, :, :1].float(), attention.key[:, :, attention.prefix :].float()
    logits = query @ key.mT * attention.scaling  # [B, H, 1, P]
    if attention.valid is not None:
        logits = logits.masked_fill(~attention.valid[:, None, None, attention.prefix :], -torch.inf)
    return torch.nn.functional.pad(logits.softmax(-1)[:, :, 0].mean(1), (attention.prefix, 0))


def received_saliency(attention: Attention) -> Tensor:
    """`[B, N]` attention received from all patches of the same image, summed over queries, mean over heads."""
    batch, _, length, _ = attention.query.shape
    if attention.offsets is not None:
        sizes = attention.offsets.diff().to(attention.query.device)
        queries = torch.repeat_interleave(sizes, sizes, output_size=length)[None]
    elif attention.valid is not None:
        queries = attention.valid.sum(1, keepdim=True)
    else:
        queries = torch.full((batch, 1), length, device=attention.query.device)
    return attention.received() * queries


@register("scope")
@dataclass
class Scope(Method):
    """Keeps salient tokens by greedy coverage of the projected features, before the decoder.

    Paper: SCOPE, arXiv 2510.24214 (NeurIPS 2025), section 3. Let `m_j` be the largest cosine of token `j` to a picked
    token, 0 at first. Every pick maximizes `s_i^alpha * sum_j max(0, cos_ij - m_j)`: the coverage of all tokens that
    token `i` would add, times its saliency. All pictures of a sample are one group. Saliency, as in the release of
    AngelSlim: attention of the class token over the patches, read in the layer whose output is projected; for towers
    without one, attention received in the last layer, summed over queries and over the patches of a token.

    With `alpha=0` nothing is read from the vision tower, and the choice is greedy facility location, whose coverage is
    at least 1 - 1/e of the best possible.

    Differences from the releases: gains are evaluated lazily, with the same result; a feature of zeros covers nothing
    (there it makes every later pick NaN); newline tokens are not candidates and are dropped first; in large pictures
    all queries count (there the mean query stands for 6,144 patches or more).

    Attributes:
        alpha: Exponent of the saliency, 0 or more.
        combine: `"product"` of saliency and gain, or their `"sum"`, an option of both releases.
        positions: `"compact"` renumbers the kept tokens 0, 1, 2, ..., as in the release for LLaVA; by default they keep
            their position ids. Not for models with position ids on several axes (M-RoPE).
    """

    alpha: AtLeastZero = 1.0
    combine: Literal["product", "sum"] = "product"
    positions: Literal["original", "compact"] = "original"

    def schedule(self, num_layers: int) -> tuple[Stage, ...]:
        return (Stage(0, 64 / 576),)

    def taps(self, anatomy: Anatomy) -> Iterable[Tap]:
        if self.alpha == 0:
            return ()
        which: Literal["feature", "last"] = "feature" if has_class_token(anatomy) else "last"
        return (projector_tap(anatomy, self.name), layer_tap(anatomy, which))

    def choose(self, tokens: Tokens) -> Choice:
        saliency = None if self.alpha == 0 else self.saliency(tokens)
        order = facility_location(
            tokens.placed_hidden,
            None if saliency is None else saliency.nan_to_num(0.0).clamp_min(0) ** self.alpha,
            tokens.offsets,
            tokens.budgets,
            tokens.max_budget,
            tokens.max_length,
            self.combine,
        )
        return Choice(from_order(order, len(tokens)), scores=saliency)

    def saliency(self, tokens: Tokens) -> Tensor:
        """`[M]` float32 saliency of every token, NaN for tokens without a patch (newlines)."""
        vision = Vision(tokens, self.name)
        by_class = has_class_token(vision.anatomy)
        found = vision.tokens_of_patches(class_saliency if by_class else received_saliency, total=not by_class)
        return found if tokens.correct_attention is None else tokens.correct_attention(found)
