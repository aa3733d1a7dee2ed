# SPDX-License-Identifier: Apache-2.0
"""DART: duplication matters more than importance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import MethodError
from ..selection import segment_ids
from .base import Choice, Method, Stage, Tap, Tokens
from .pivots import duplication_aware
from .registry import register
from .taps import layer_output, over_prompt

if TYPE_CHECKING:
    from ..anatomy import Anatomy


def key_size(keys: Tensor) -> Tensor:
    """L1 norm of the keys `[n, G, dh]` over all their heads, `[n]` in float32."""
    return keys.float().abs().sum(dim=(-2, -1))


@register("dart")
@dataclass
class DART(Method):
    """Keeps pivots and the tokens that resemble the pivots least, in the decoder before layer K.

    Paper: Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More, arXiv 2502.11494.
    Reads the keys of layer K-1 and the states entering layer K; no attention.

    Pivots are the `pivots` visual tokens and the `pivots` text tokens after the last image with the largest L1 norm of
    their keys (all KV heads together). One pivot after the other, in ascending order of columns, takes the tokens with
    the smallest cosine to it, of the states after the decoder's final norm, among those not taken yet.

    Differences from the release: keys are read before rotation, because the L1 norm of a rotated key changes with the
    padding in front of the prompt (`rope=True` is the release). The count is exactly the budget: the pivots share what
    the visual ones leave over, the first ones one more each where it does not divide evenly (`exact=False` is the
    released count, `pivots + 2 pivots * floor(budget / (2 pivots))`, which `patch` refuses where it is not the budget).
    The order of the pivots is fixed. Text pivots come after the last image of a sample. K is clamped to the last layer.
    Before the decoder (K = 0, or a decoder of one layer) there is no layer K-1: the keys are those of layer 0, and
    there are no text pivots.

    Attributes:
        layer: K, the layer before which tokens are dropped.
        pivots: Pivots of each kind.
        exact: Whether the count is the budget.
        rope: Whether the keys are rotated.
    """

    layer: int = 2
    pivots: int = 4
    exact: bool = True
    rope: bool = False

    def __post_init__(self) -> None:
        if self.pivots < 1 or self.layer < 0:
            raise MethodError(f"DART has layer={self.layer}, pivots={self.pivots}; expected layer >= 0 and pivots >= 1")

    def schedule(self, num_layers: int) -> tuple[Stage, ...]:
        return (Stage(min(self.layer, num_layers - 1), 0.222),)

    def reads(self, num_layers: int) -> tuple[int, ...]:
        return (max(self.schedule(num_layers)[0].layer - 1, 0),)

    def taps(self, anatomy: Anatomy) -> tuple[Tap, ...]:
        cut = self.schedule(anatomy.num_layers)[0].layer
        return (Tap("dart.states", anatomy.layers[cut - 1], layer_output),) if cut else ()

    def choose(self, tokens: Tokens) -> Choice:
        inputs = tokens.attention_inputs(max(tokens.layer - 1, 0), rope=self.rope)
        size = key_size(inputs.keys)  # [C]
        norm = final_norm(tokens.anatomy)
        hidden = norm(tokens.hidden).to(size.device)
        records, prompt = tokens.observed.get("dart.states"), tokens.prompt
        if records and prompt is not None:
            text = norm(over_prompt(records[-1], tokens)[prompt.text]).to(size.device)  # [R, D]
            ends = inputs.query_segments
            asked = inputs.query_order + inputs.key_segments[:-1][segment_ids(ends, len(inputs.query_order))]
        else:
            text, ends, asked = hidden[:0], torch.zeros_like(inputs.query_segments), inputs.query_order[:0]
        keep = duplication_aware(
            hidden,
            size[inputs.visual],
            tokens.segments,
            tokens.budgets,
            text,
            size[asked],
            ends,
            self.pivots,
            self.exact,
        )
        return Choice(keep)


def final_norm(anatomy: Anatomy | None) -> nn.Module:
    """The norm after the decoder's last layer, found by its class name among the decoder's own children."""
    children = anatomy.decoder.children() if anatomy is not None else ()
    norms = [child for child in children if "norm" in type(child).__name__.lower()]
    return norms[-1] if norms else nn.Identity()
