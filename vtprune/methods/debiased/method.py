# SPDX-License-Identifier: Apache-2.0
"""Debiased: removes from the scores of another method their bias toward late tokens and padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ...core.method import Choice, ScoreMethod
from ...core.registry import register
from ...core.tokens import Tokens
from ...core.wrapper import Wrapper
from ..fastv import FastV
from ..sparsevlm.method import SparseVLM
from .curve_fitting import Fit
from .padding import PaddingRule, shown
from .position_curve import Curve

_RULES = {"pyramiddrop": PaddingRule("area", 0.01), "sparsevlm": PaddingRule("bilinear")}


@register("debiased")
@dataclass
class Debiased(Wrapper, ScoreMethod):
    """Corrects position bias and padding in the scores of another method, such as `Debiased(FastV())`.

    Paper: Attention Debiasing for Token Pruning, arXiv 2508.17807. Curves were released for `FastV`, `PyramidDrop` and
    `SparseVLM`; others need one of their own (`fit`). Cuts where the host cuts, reads what the host reads.

    `score_i = w(i / (N - 1)) * shown_i * host_i`: `i` is the index of the token among the `N` original visual tokens
    of its sample, `w` a falling curve fitted to the host's mean scores, `shown_i` 0 for padding. Padding is computed
    from the size of the picture. LLaVA-1.5, whose processor pads with `do_pad=True`, gets no sizes in its call: pass
    them as `sizes`.

    Differences from the release: curves apply to any number of tokens; the budget is kept where fewer tokens than that
    show the picture, and padding fills it in the order of the prompt (the release lowers the budget for FastV);
    `stages="all"` corrects later cuts too, by original indices; SparseVLM recycles by corrected scores, so that padding
    does not come back (`recycle="raw"` is the release). The released curves were fitted per benchmark on 576 tokens of
    one model. The defaults are the one of FastV and those of GQA; use `fit` for a curve of your own model, through
    logarithms (`form="log-linear"`) where the scores of the last places are many times as large as the others.

    Attributes:
        host: The method to correct.
        curve: A curve, the name of a released one (`"sparsevlm/pope"`), the path of a saved one (`.json`), or `"flat"`
            to suppress padding only; None for the host's default.
        padding: Whether padding is suppressed.
        rule: When a cell at the border counts as padding; None as released (FastV: more than half of its area;
            PyramidDrop: more than 1 %; SparseVLM: by a downscaled mask).
        stages: Which cuts are corrected, the `"first"` or `"all"`.
        recycle: Scores that SparseVLM recycles by, `"debiased"` or `"raw"`.
        sizes: Height and width of every picture of the next call, in order, `[n, 2]`; None where the call has
            `image_sizes`, or nothing is padded. May be set before each call.
    """

    host: ScoreMethod = field(default_factory=FastV)
    curve: Curve | str | None = None
    padding: bool = True
    rule: PaddingRule | None = None
    stages: Literal["first", "all"] = "first"
    recycle: Literal["debiased", "raw"] = "debiased"
    sizes: Sequence[Sequence[int]] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._curve = Curve.of(self.curve, self.host.name)
        self._rule = self.rule or _RULES.get(self.host.name, PaddingRule())

    def fit(
        self,
        scores: Sequence[Tensor],
        seen: Sequence[Tensor],
        form: Fit = "exponential",
        path: str | Path | None = None,
    ) -> Curve:
        """Fits the curve to scores of the host, such as `vtprune.study.calibration.fit` collects from a model.

        The mean over samples of the scores, each divided by its mean over the tokens that are not padding, is fitted by
        least squares (see `Curve.fit`). This method uses the curve from then on.

        Args:
            scores: For every sample `[N]` first scores of the host.
            seen: For every sample `[N]` bool, False for padding.
            form: Form of the curve, `"exponential"`, `"log-linear"` or `"reciprocal-cubic"`, see `Curve.fit`.
            path: File to save the curve to as JSON, for a later `curve=path`.

        Returns:
            Curve: The fitted curve.

        Raises:
            MethodError: There are too few scores for the form.
        """
        self.curve = self._curve = Curve.fit(scores, seen, form)
        if path is not None:
            self._curve.save(path)
        return self._curve

    @property
    def padding_rule(self) -> PaddingRule | None:
        """Rule for padding; None where `padding` is off."""
        return self._rule if self.padding else None

    def weights(self, tokens: Tokens) -> Tensor:
        """`[M]` factors of the host's scores, from the indices of the tokens before any cut."""
        sample = tokens.sample[tokens.offsets[:-1]]  # of each group
        counts = torch.zeros(int(sample.max()) + 1, dtype=torch.int64, device=sample.device)
        counts.index_add_(0, sample, tokens.originals.to(sample.device))
        number = counts.cumsum(0)[tokens.sample] - counts[tokens.sample] + tokens.index
        weight = self._curve(tokens.index.float() / (counts[tokens.sample] - 1).clamp_min(1))
        if not self.padding:
            return weight
        if "debiased.shown" not in tokens.memory:
            tokens.memory["debiased.shown"] = shown(tokens, self._rule, self.sizes)
        return weight * tokens.memory["debiased.shown"][number]

    def score(self, tokens: Tokens) -> Tensor:
        raw = self.host.score(tokens)
        tokens.memory["debiased.raw"] = raw
        return raw * self.weights(tokens) if tokens.stage == 0 or self.stages == "all" else raw

    def select(self, tokens: Tokens, scores: Tensor) -> Choice:
        if self.recycle == "raw" and isinstance(self.host, SparseVLM):
            return self.host.select(tokens, scores, recycle_by=tokens.memory["debiased.raw"])
        return self.host.select(tokens, scores)
