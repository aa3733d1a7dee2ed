# SPDX-License-Identifier: Apache-2.0
"""Collecting a method's own scores over a user's pictures, for position curves to be fitted to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import MethodError
from ..selection import top_k
from .base import Choice, Method, ScoreMethod, Stage, Tap, Tokens
from .padding import PaddingRule, shown

if TYPE_CHECKING:
    from ..anatomy import Anatomy


@dataclass
class Collector(Method):
    """Cuts once, where its host cuts first, and writes down what the host would have ranked by.

    Attributes:
        host: Whose scores are collected.
        rule: How padding is told, or None where nothing is padding.
        sizes: Heights and widths of the pictures of the next call, where it does not say them itself.
        scores: Filled with `[N]` scores of the visual tokens of every sample, on the CPU.
        shown: Filled with `[N]` bool, False for padding.
    """

    host: ScoreMethod
    rule: PaddingRule | None = None
    sizes: Sequence[Sequence[int]] | None = None
    scores: list[Tensor] = field(default_factory=list)
    shown: list[Tensor] = field(default_factory=list)

    def schedule(self, num_layers: int) -> tuple[Stage, ...]:
        return tuple(self.host.schedule(num_layers))[:1]

    def reads(self, num_layers: int) -> Iterable[int]:
        return self.host.reads(num_layers)

    def taps(self, anatomy: Anatomy) -> Iterable[Tap]:
        return self.host.taps(anatomy)

    def choose(self, tokens: Tokens) -> Choice:
        scores = self.host.score(tokens).float()
        seen = torch.ones_like(scores, dtype=torch.bool) if self.rule is None else shown(tokens, self.rule, self.sizes)
        lengths = torch.unique_consecutive(tokens.sample, return_counts=True)[1].tolist()
        self.scores += scores.cpu().split(lengths)
        self.shown += seen.cpu().split(lengths)
        return Choice(top_k(scores, tokens.segments, tokens.budgets))


def collect(
    host: ScoreMethod,
    rule: PaddingRule | None,
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    sizes: Iterable[Sequence[Sequence[int]] | None] | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Runs a model over prompts with pictures and collects the first scores of a method.

    Args:
        host: The method.
        rule: How padding is told, or None where nothing is padding.
        model: A model without a patch; it has none afterwards.
        batches: Keyword arguments of the model's calls, as processors make them; answers are not needed.
        sizes: For every batch the heights and widths of its pictures, where the calls do not say them.

    Returns:
        tuple: For every sample with visual tokens `[N]` scores, and `[N]` bool, False for padding.

    Raises:
        MethodError: The model has a patch already, or no prompt held a visual token.
    """
    from ..patching import find_patch, patch

    if find_patch(model) is not None:
        raise MethodError("the model is patched: remove the patch before scores are collected from it")
    collector = Collector(host, rule)
    with patch(model, ratio=0.5, method=collector), torch.no_grad():
        # Without sizes, None for every batch; with them, as many as there are batches.
        pairs = zip(batches, repeat(None)) if sizes is None else zip(batches, sizes, strict=True)
        for batch, collector.sizes in pairs:
            model(**batch)
    if not collector.scores:
        raise MethodError("no prompt held a visual token; expected batches as the processor makes them, with pictures")
    return collector.scores, collector.shown
