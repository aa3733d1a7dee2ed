# SPDX-License-Identifier: Apache-2.0
"""DART: drops visual tokens that duplicate a few pivot tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..core.method import Choice, Method, Stage, Tap
from ..core.options import Count, Positive
from ..core.ragged import group_ids, settle_ties, top_k
from ..core.registry import register
from ..core.taps import layer_output, mean_of_streams, over_prompt
from ..core.tokens import Tokens

if TYPE_CHECKING:
    from ..models.anatomy import Anatomy


def take_least_similar(hidden: Tensor, start: Tensor, pivots: list[Tensor], offsets: Tensor, quota: Tensor) -> Tensor:
    """Takes, pivot by pivot, the remaining tokens that are least similar to the pivot.

    Args:
        hidden: `[M, D]` states of the candidates.
        start: `[M]` bool, the tokens taken beforehand.
        pivots: For each group `[P, D]` states of its pivots, in the order in which they take tokens.
        offsets: `[S + 1]` offsets of the groups.
        quota: `[S]` tokens that the pivots of a group take together, divided evenly; the first pivots take the
            remainder, one each. At most the number of tokens that are left.

    Returns:
        Tensor: `[M]` bool, `start` and the tokens taken. Ties go to the smaller row.
    """
    lengths = offsets.diff().tolist()
    unit = nn.functional.normalize(torch.nan_to_num(hidden.float()), dim=-1)
    dense = pad_sequence(list(unit.split(lengths)), batch_first=True)  # [S, N, D]
    taken = pad_sequence(list(start.split(lengths)), batch_first=True, padding_value=1).bool()  # [S, N]
    number = torch.tensor([len(p) for p in pivots], device=hidden.device).clamp_min(1)
    axes = nn.functional.normalize(torch.nan_to_num(pad_sequence(pivots, batch_first=True).float()), dim=-1)
    similarity = axes @ dense.mT  # [S, P, N]
    for p in range(axes.shape[1]):
        share = torch.where(p < number, quota // number + (p < quota % number), 0)
        distance = (-similarity[:, p]).masked_fill(taken, -torch.inf)  # [S, N]
        edges = torch.arange(0, distance.numel() + 1, distance.shape[1], device=distance.device)
        distance = settle_ties(distance.flatten(), edges).view_as(distance)
        order = distance.sort(dim=1, descending=True, stable=True).indices
        taken |= order.argsort(dim=1) < share[:, None]
    return torch.cat([row[:n] for row, n in zip(taken, lengths, strict=True)])


def duplication_aware(
    hidden: Tensor,
    size: Tensor,
    offsets: Tensor,
    budgets: Tensor,
    text: Tensor,
    text_size: Tensor,
    text_offsets: Tensor,
    pivots: int = 4,
    exact: bool = True,
) -> Tensor:
    """Selects the pivots and the tokens least similar to them.

    Args:
        hidden: `[M, D]` normed states of the visual tokens.
        size: `[M]` L1 norms of their keys.
        offsets: `[S + 1]` offsets of the groups.
        budgets: `[S]` counts.
        text: `[R, D]` normed states of the text after the image.
        text_size: `[R]` L1 norms of its keys.
        text_offsets: `[S + 1]` offsets of each group's text.
        pivots: Pivots of each kind.
        exact: False takes `floor(budget / (2 pivots))` tokens per pivot, as released.

    Returns:
        Tensor: `[M]` bool.
    """
    budgets = budgets.to(hidden.device)
    sizes = offsets.diff().to(hidden.device)
    own = (budgets if exact else sizes).clamp_max(pivots)  # visual pivots of each group
    image = top_k(size, offsets, own)
    words = top_k(text_size, text_offsets, text_offsets.diff().clamp_max(pivots))
    groups = group_ids(offsets, len(size))[image], group_ids(text_offsets, len(text_size))[words]
    of_image, of_text = (group.bincount(minlength=len(budgets)).tolist() for group in groups)
    # Visual pivots come before text pivots, as they do in the prompt.
    states = [torch.cat(pair) for pair in zip(hidden[image].split(of_image), text[words].split(of_text), strict=True)]
    room, quota = sizes - own, budgets - own
    if not exact:
        quota = budgets // (2 * pivots) * torch.tensor([len(s) for s in states], device=hidden.device)
    return take_least_similar(hidden, image, states, offsets, torch.minimum(quota, room))


def key_size(keys: Tensor) -> Tensor:
    """`[n]` float32 L1 norm of keys `[n, G, dh]`, summed over all KV heads."""
    return keys.float().abs().sum(dim=(-2, -1))


@register("dart")
@dataclass
class DART(Method):
    """Keeps pivot tokens and the tokens least similar to them, in the decoder before layer K.

    Paper: Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More, arXiv 2502.11494.
    Reads the keys of layer K-1 and the states entering layer K; no attention.

    Pivots are the `pivots` visual tokens and the `pivots` text tokens after the last image with the largest L1 norm of
    their keys (all KV heads together). One pivot after the other, in the order of the prompt, takes from the remaining
    tokens those with the smallest cosine to it, measured on the states after the decoder's final norm.

    Differences from the release: keys are read before rotation, because the L1 norm of a rotated key changes with the
    padding in front of the prompt (`rope=True` is the release). The count is exactly the budget: the pivots divide what
    the visual ones leave of it, the first ones taking one more each where it does not divide evenly (`exact=False` is
    the released count, `pivots + 2 pivots * floor(budget / (2 pivots))`, which `patch` refuses where it is not the
    budget). The order of the pivots is fixed. Text pivots come after the last image of a sample. K is clamped to the
    last layer. Before the decoder (K = 0, or a decoder of one layer) there is no layer K-1: the keys are those of layer
    0, and there are no text pivots.

    Attributes:
        layer: K, the layer before which tokens are dropped.
        pivots: Pivots of each kind.
        exact: Whether the count is the budget.
        rope: Whether the keys are rotated.
    """

    question_aware: ClassVar[bool] = True

    layer: Count = 2
    pivots: Positive = 4
    exact: bool = True
    rope: bool = False

    def schedule(self, num_layers: int) -> tuple[Stage, ...]:
        return (Stage(min(self.layer, num_layers - 1), 0.222),)

    def required_layer_inputs(self, num_layers: int) -> tuple[int, ...]:
        return (max(self.schedule(num_layers)[0].layer - 1, 0),)

    def taps(self, anatomy: Anatomy) -> tuple[Tap, ...]:
        cut = self.schedule(anatomy.num_layers)[0].layer
        return (Tap("dart.states", anatomy.layers[cut - 1], layer_output),) if cut else ()

    def choose(self, tokens: Tokens) -> Choice:
        inputs = tokens.attention_inputs(max(tokens.layer - 1, 0), rope=self.rope)
        size = key_size(inputs.keys)  # [C]
        norm = final_norm(tokens.anatomy)
        hidden = norm(tokens.hidden).to(size.device)
        records, prompt = tokens.recorded.get("dart.states"), tokens.prompt
        if records and prompt is not None:
            states = mean_of_streams(over_prompt(records[-1], tokens)[prompt.text], tokens.hidden.shape[1])
            text = norm(states).to(size.device)  # [R, D]
            ends = inputs.query_offsets
            text_rows = inputs.query_order + inputs.key_offsets[:-1][group_ids(ends, len(inputs.query_order))]
        else:
            text, ends, text_rows = hidden[:0], torch.zeros_like(inputs.query_offsets), inputs.query_order[:0]
        keep = duplication_aware(
            hidden,
            size[inputs.visual],
            tokens.offsets,
            tokens.budgets,
            text,
            size[text_rows],
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
