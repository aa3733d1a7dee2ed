# SPDX-License-Identifier: Apache-2.0
"""TransPrune: how much a layer changes a token, and how much the instruction looks at it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ..errors import MethodError
from .base import Choice, ScoreMethod, Stage, Tap, Tokens
from .depth import scale_schedule
from .fastv import visual_attention
from .options import check_choices
from .registry import register
from .taps import over_prompt
from .transition import MODULES, combine, recorded_change, submodule, variation

if TYPE_CHECKING:
    from ..anatomy import Anatomy


@register("transprune")
@dataclass
class TransPrune(ScoreMethod):
    """Keeps, at three depths, the tokens that layers change most and that the instruction attends to.

    Paper: TransPrune, arXiv 2507.20630, sections 3.2 and 3.3. Cuts before layers 7, 9 and 12 of 32. Reads input and
    output of the attention and of the MLP in the layers from the one before the first cut to the one before the last,
    and queries and keys of the layer that comes next.

    For a module with normed input `x` and output `y` before the residual: `TTV = |y|/|x| * softmax(1 - cos(y, x))`,
    added up over both modules of the layers seen so far. `IGA` is the attention from the text after the image, mean
    over heads and rows. `score = alpha * TTV / sum(TTV) + (1 - alpha) * IGA / sum(IGA)`.

    As in the release and unlike the paper: the sign of the cosine counts (`direction="absolute"` is the paper's form),
    the softmax runs over text and visual tokens (`support="visual"` is the paper's), both parts are normalised before
    they are added. Differences from the release: the softmax ends at the sample instead of running over the whole
    batch, counts are rounded, KV heads may be grouped, all images of a sample are one pool, everything is in float32;
    survivors keep their positions, unless `positions="compact"`.

    Attributes:
        layers: Cuts, as layers of a decoder of `depth` layers, scaled to the decoder at hand (cuts that meet become
            one).
        shares: Share of the original tokens that is left after each cut.
        depth: Decoder length that `layers` refers to; None takes them as they are.
        alpha: Weight of TTV.
        direction: `"signed"` or `"absolute"` change of direction.
        support: Tokens that the softmax runs over, `"all"` or `"visual"`.
        positions: `"compact"` renumbers the survivors 0, 1, 2, ... after every cut, as released; by default they keep
            their positions. Not for models that place tokens on several axes.
    """

    layers: tuple[int, ...] = (7, 9, 12)
    shares: tuple[float, ...] = (0.875, 0.625, 0.125)
    depth: int | None = 32
    alpha: float = 0.5
    direction: Literal["signed", "absolute"] = "signed"
    support: Literal["all", "visual"] = "all"
    positions: Literal["original", "compact"] = "original"

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise MethodError(f"TransPrune has alpha={self.alpha}; expected a weight from 0 to 1")
        check_choices(self)

    def schedule(self, num_layers: int) -> tuple[Stage, ...]:
        return scale_schedule(self.layers, self.shares, self.depth, num_layers, "TransPrune")

    def taps(self, anatomy: Anatomy) -> Iterable[Tap]:
        cuts = self.schedule(anatomy.num_layers)
        watched = range(max(cuts[0].layer - 1, 0), cuts[-1].layer)
        record = partial(recorded_change, direction=self.direction)
        found = [
            Tap("transprune.change", module, record)
            for layer in watched
            for part in ("attention", "mlp")
            if (module := submodule(anatomy.layers[layer], part)) is not None
        ]
        if watched and not found:
            raise MethodError(
                f"TransPrune found neither attention nor MLP in {type(anatomy.layers[watched[0]]).__name__}: expected "
                f"children named like {MODULES['attention']} and {MODULES['mlp']}; use a method that needs attention "
                "alone"
            )
        return found

    def score(self, tokens: Tokens) -> Tensor:
        ttv = self._new_variation(tokens)
        if "transprune.ttv" in tokens.memory:
            ttv = ttv + tokens.memory["transprune.ttv"]
        tokens.memory["transprune.ttv"] = ttv
        return combine(ttv, visual_attention(tokens.attention_inputs()), tokens.segments, self.alpha)

    def select(self, tokens: Tokens, scores: Tensor) -> Choice:
        choice = super().select(tokens, scores)
        tokens.memory["transprune.ttv"] = tokens.memory["transprune.ttv"][choice.keep]
        return choice

    def _new_variation(self, tokens: Tokens) -> Tensor:
        """TTV of the visual tokens in the modules that ran since the last cut, `[M]`."""
        records, prompt = tokens.observed.get("transprune.change", []), tokens.prompt
        seen = tokens.memory.get("transprune.seen", 0)
        tokens.memory["transprune.seen"] = len(records)
        total = torch.zeros(len(tokens), device=tokens.hidden.device)
        for record in records[seen:]:
            changes = over_prompt(record, tokens)  # [C, 2]
            assert prompt is not None
            if self.support == "all":
                total += variation(changes, prompt.segments)[prompt.visual]
            else:
                total += variation(changes[prompt.visual], tokens.segments)
        return total
