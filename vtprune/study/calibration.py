# SPDX-License-Identifier: Apache-2.0
"""Collection of a method's scores on your pictures, to fit position curves to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..core.method import Choice, Method, ScoreMethod, Stage, Tap
from ..core.options import shorten
from ..core.ragged import top_k
from ..core.tokens import Tokens
from ..engine.patching import patch, refuse_patched
from ..errors import MethodError
from ..methods.debiased.curve_fitting import Fit
from ..methods.debiased.method import Debiased
from ..methods.debiased.padding import PaddingRule, shown
from ..methods.debiased.position_curve import Curve
from .given import batches_of
from .metrics import NO_PICTURES

if TYPE_CHECKING:
    from ..models.anatomy import Anatomy


@dataclass
class Collector(Method):
    """Cuts once, at the first cut of its host, and records the scores that the host ranks by.

    Attributes:
        host: Method whose scores are collected.
        rule: Rule for padding, or None if nothing is padding.
        sizes: Heights and widths of the pictures of the next call, if its arguments lack them.
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

    def required_layer_inputs(self, num_layers: int) -> Iterable[int]:
        return self.host.required_layer_inputs(num_layers)

    def taps(self, anatomy: Anatomy) -> Iterable[Tap]:
        return self.host.taps(anatomy)

    def choose(self, tokens: Tokens) -> Choice:
        scores = self.host.score(tokens).float()
        seen = torch.ones_like(scores, dtype=torch.bool) if self.rule is None else shown(tokens, self.rule, self.sizes)
        lengths = torch.unique_consecutive(tokens.sample, return_counts=True)[1].tolist()
        self.scores += scores.cpu().split(lengths)
        self.shown += seen.cpu().split(lengths)
        return Choice(top_k(scores, tokens.offsets, tokens.budgets))


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
        rule: Rule for padding, or None if nothing is padding.
        model: An unpatched model; it is unpatched afterwards.
        batches: Keyword arguments of the model's calls, as its processor returns them, without answers.
        sizes: For every batch the heights and widths of its pictures, if the calls lack them.

    Returns:
        tuple: For every sample with visual tokens `[N]` scores, and `[N]` bool, False for padding.

    Raises:
        InputError: The model is patched, or `batches` is a single batch or holds something else.
        MethodError: No prompt has a visual token.
    """
    refuse_patched(model, "collecting scores")
    collector = Collector(host, rule)
    with patch(model, ratio=0.5, method=collector), torch.no_grad():
        each = batches_of(batches)
        pairs = zip(each, repeat(None)) if sizes is None else zip(each, sizes, strict=True)
        for batch, collector.sizes in pairs:
            model(**batch)
    if not collector.scores:
        raise MethodError(NO_PICTURES)
    return collector.scores, collector.shown


def fit(
    method: Debiased,
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    form: Fit = "exponential",
    path: str | Path | None = None,
    sizes: Iterable[Sequence[Sequence[int]] | None] | None = None,
) -> Curve:
    """Fits a method's curve to its host's scores on your own pictures, without labels.

    Do not calibrate on a test set. The method uses the curve from then on.

    Args:
        method: The method to calibrate.
        model: The unpatched model that the method is for; it runs once over every batch.
        batches: Keyword arguments of its calls, as its processor returns them.
        form: Form of the curve, see `Curve.fit`.
        path: File to save the curve to as JSON, for a later `curve=path`.
        sizes: For every batch the heights and widths of its pictures, if the calls lack them.

    Returns:
        Curve: The fitted curve.

    Raises:
        InputError: The model is patched, or `batches` is a single batch or holds something else.
        MethodError: The method has no curve, no prompt has a picture, or there are too few scores for the form.
    """
    if not isinstance(method, Debiased):
        raise MethodError(f"method is {shorten(method)}; expected a method with a curve, such as Debiased(FastV())")
    scores, seen = collect(method.host, method.padding_rule, model, batches, sizes)
    return method.fit(scores, seen, form, path)
