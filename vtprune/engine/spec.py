# SPDX-License-Identifier: Apache-2.0
"""What a patch was asked for, and of which model: fixed when the model is patched."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from ..core.budget import Budget, check_schedule, mean_share, solve_mean, stretch
from ..core.method import Method, Stage, Tap
from ..errors import MethodError, VTPruneError
from ..models import anatomy as _anatomy
from ..models.anatomy import Anatomy
from ..report.cost import DecoderShape
from .columns import AttentionForm


@dataclass(frozen=True)
class PruneSpec:
    """What was asked for.

    Attributes:
        method: The method's instance.
        budget: How many visual tokens it keeps.
        anatomy: The parts of the model.
        schedule: Where the method cuts this decoder.
        taps: What the method records while the model runs.
        renumbers: Whether kept tokens get consecutive position ids.
    """

    method: Method
    budget: Budget
    anatomy: Anatomy
    schedule: tuple[Stage, ...]
    taps: tuple[Tap, ...]
    renumbers: bool

    @classmethod
    def of(cls, model: nn.Module, method: Method, budget: Budget) -> PruneSpec:
        """Finds the parts of a model and checks that the method and the budget fit it.

        Raises:
            UnsupportedModelError: A part of the model was not found.
            MethodError: A need of the method that the model cannot meet.
            BudgetError: The budget cannot be met at the layers where the method cuts.
        """
        anatomy = _anatomy.find(model)
        layers = anatomy.num_layers
        schedule = tuple(method.schedule(layers))
        check_schedule(schedule, layers, type(method).__name__)
        if budget.mean_ratio is not None:
            solve_mean(schedule, budget.mean_ratio, layers)  # raises where it cannot be met
        renumbers = _renumbers(method, anatomy)
        return cls(method, budget, anatomy, schedule, tuple(method.taps(anatomy)), renumbers)

    @cached_property
    def column_taps(self) -> frozenset[str]:
        """Names of the taps whose records follow the prompt's columns."""
        return frozenset(tap.name for tap in self.taps if tap.columns)

    @property
    def mean_ratio(self) -> float:
        """Expected mean share over layer inputs for `ratio` and `mean_ratio` budgets.

        Raises:
            VTPruneError: The budget is `keep`.
        """
        if self.budget.keep is not None:
            raise VTPruneError("with keep= the mean ratio depends on the prompt; see patch.last.mean_ratio")
        layers = self.anatomy.num_layers
        ratio = self.budget.ratio or solve_mean(self.schedule, self.budget.mean_ratio or 1.0, layers)
        return mean_share(self.schedule, stretch(self.schedule, ratio), layers)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the decoder's embeddings, which masks are made in."""
        weight: torch.Tensor = self.anatomy.embeddings.weight  # type: ignore[assignment]
        return weight.dtype

    @property
    def attention_form(self) -> AttentionForm:
        """Which form of mask the decoder's attention takes; may change while the model is patched."""
        name = str(getattr(self.anatomy.decoder.config, "_attn_implementation", None) or "eager")
        name = getattr(ALL_MASK_ATTENTION_FUNCTIONS.get(name), "__name__", name)
        return AttentionForm(name, self.dtype, next(self.anatomy.decoder.parameters()).device)

    @property
    def shape(self) -> DecoderShape:
        """Sizes of the decoder that its costs follow from."""
        return DecoderShape.of(self.anatomy.decoder.config, torch.empty((), dtype=self.dtype).element_size())


def _renumbers(method: Method, anatomy: Anatomy) -> bool:
    """Whether the method wants survivors renumbered; raises where the model's positions have several axes."""
    policy = getattr(method, "positions", "original")
    if policy not in ("original", "compact"):
        raise MethodError(f'{type(method).__name__}.positions is {policy!r}; expected "original" or "compact"')
    rope = getattr(anatomy.decoder.config, "rope_parameters", None) or {}
    if policy == "compact" and "mrope_section" in str(rope):
        raise MethodError(
            'positions="compact" numbers tokens on one axis, but this model places them by time, height and '
            'width; use positions="original"'
        )
    return policy == "compact"
