# SPDX-License-Identifier: Apache-2.0
"""Calibration of automatic ratios: the energy that keeps a given mean share of tokens on your pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..core.energy import Auto, energy_left
from ..core.method import Choice, Method, Stage
from ..core.tokens import Tokens
from ..engine.patching import patch, refuse_patched
from ..errors import BudgetError, VTPruneError
from .given import batches_of
from .metrics import NO_PICTURES

STEPS = 20  # bisection steps


@dataclass
class Curves(Method):
    """Records how the residual energy of each picture falls with the number of picks, before the decoder.

    Attributes:
        most: Largest share of a picture's tokens to pick.
        left: Filled with `[k]` energies left after 1, 2, ... picks, one for every picture.
        sizes: Filled with the number of tokens of every picture.
    """

    most: float = 1.0
    left: list[Tensor] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    def schedule(self, num_layers: int) -> tuple[Stage, ...]:
        return (Stage(0, 0.5),)

    def choose(self, tokens: Tokens) -> Choice:
        first = torch.ones(len(tokens), dtype=torch.bool)
        first[1:] = (tokens.sample.diff() != 0).cpu() | (tokens.image.diff() != 0).cpu()
        offsets = torch.cat([first.nonzero()[:, 0], torch.tensor([len(tokens)])])
        self.left += energy_left(tokens.placed_hidden, offsets, self.most)
        self.sizes += offsets.diff().tolist()
        rank = torch.arange(len(tokens), device=tokens.hidden.device) - tokens.offsets[tokens.group]
        return Choice(rank < tokens.budgets[tokens.group])


def shares(left: Sequence[Tensor], sizes: Sequence[int], auto: Auto) -> list[float]:
    """Share of its tokens that each picture would keep.

    Args:
        left, sizes: Fields of `Curves`, recorded with `most` of at least `auto.max`.
        auto: Energy and bounds.
    """
    return [auto.count(curve, size) / size for curve, size in zip(left, sizes, strict=True)]


def calibrate(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    ratio: float,
    least: float = 0.02,
    most: float = 0.5,
) -> tuple[Auto, list[float]]:
    """Finds the automatic ratio with the largest mean share over pictures that is not above a given one.

    The mean share of tokens kept rises with the energy, so the energy is found by bisection in 20 steps. The model runs
    once over every batch.

    Args:
        model: An unpatched vision-language model; it is unpatched afterwards.
        batches: Keyword arguments of its calls, as its processor returns them.
        ratio: Mean share of tokens to keep.
        least, most: `Auto.min` and `Auto.max`.

    Returns:
        tuple: The `Auto`, and the share that each picture keeps with it.

    Raises:
        BudgetError: The mean is not between the bounds.
        InputError: `batches` is a single batch, or holds something else.
        VTPruneError: The model is patched, or no prompt has a visual token.
    """
    Auto(min=least, max=most)  # raises where the bounds are wrong
    if not least <= ratio <= most:
        raise BudgetError(f"the mean ratio is {ratio:g}; expected a number from {least:g} to {most:g}, or other bounds")
    refuse_patched(model, "calibrating an energy")
    curves = Curves(most)
    with patch(model, ratio=0.5, method=curves), torch.no_grad():
        for batch in batches_of(batches):
            model(**batch)
    if not curves.sizes:
        raise VTPruneError(NO_PICTURES)
    low, high = 0.0, 1.0
    for _ in range(STEPS):
        middle = (low + high) / 2
        kept = shares(curves.left, curves.sizes, Auto(middle, least, most))
        low, high = (middle, high) if sum(kept) / len(kept) <= ratio else (low, middle)
    found = Auto(low or 2.0**-STEPS, least, most)
    return found, shares(curves.left, curves.sizes, found)
