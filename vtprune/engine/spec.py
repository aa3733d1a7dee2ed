# SPDX-License-Identifier: Apache-2.0
"""What a patch was asked for, and of which model: fixed when the model is patched."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from ..core.budget import Budget, check_schedule, mean_share, solve_mean, stretch
from ..core.method import Method, Stage, Tap
from ..errors import MethodError, VTPruneError
from ..models import anatomy as _anatomy
from ..models.anatomy import Anatomy
from ..models.transformers_names import mask_function_name, rope_parameters
from ..report.cost import DecoderShape
from ..report.tower import Work, weights_per_token
from ..towers import TowerMethod
from .columns import AttentionForm


@dataclass(frozen=True)
class MethodUse:
    """A method and the visual tokens that it prunes.

    Attributes:
        method: The method's instance.
        schedule: Where it cuts the decoder.
        taps: What it records while the model runs, under names that begin with `prefix`.
        kinds: Numbers of the kinds of visual tokens that it prunes, among the anatomy's placeholders; None for all.
        prefix: Keeps the records of two methods apart.
    """

    method: Method
    schedule: tuple[Stage, ...]
    taps: tuple[Tap, ...]
    kinds: frozenset[int] | None = None
    prefix: str = ""

    @classmethod
    def of(
        cls, method: Method, anatomy: Anatomy, budget: Budget, kinds: frozenset[int] | None = None, prefix: str = ""
    ) -> MethodUse:
        """Checks that a method and a budget fit a model; raises what `PruneSpec.of` does."""
        layers = anatomy.num_layers
        schedule = tuple(method.schedule(layers))
        check_schedule(schedule, layers, type(method).__name__)
        if budget.mean_ratio is not None:
            solve_mean(schedule, budget.mean_ratio, layers)  # raises where it cannot be met
        taps = tuple(replace(tap, name=prefix + tap.name) for tap in method.taps(anatomy))
        return cls(method, schedule, taps, kinds, prefix)

    @cached_property
    def tap_names(self) -> frozenset[str]:
        """Names of the method's records."""
        return frozenset(tap.name for tap in self.taps)

    def members(self, kind: Tensor) -> Tensor:
        """Which visual tokens it prunes: `[m]` numbers, from the kind of each token `[M]`."""
        if self.kinds is None:
            return torch.arange(len(kind))
        return torch.isin(kind, torch.tensor(sorted(self.kinds))).nonzero()[:, 0]


@dataclass(frozen=True)
class PruneSpec:
    """What was asked for.

    Attributes:
        uses: The method, or the one for pictures and the one for clips.
        budget: How many visual tokens are kept.
        anatomy: The parts of the model.
        renumbers: Whether kept tokens get consecutive position ids.
        window: Visual tokens of a sample that a cache may hold after a prefill; None for any number.
        tower: Cuts inside the vision tower, or None.
        by_default: Whether nobody chose the method.
    """

    uses: tuple[MethodUse, ...]
    budget: Budget
    anatomy: Anatomy
    renumbers: bool
    window: int | None = None
    tower: TowerMethod | None = None
    by_default: bool = False

    @classmethod
    def of(
        cls,
        model: nn.Module,
        method: Method,
        budget: Budget,
        video_method: Method | None = None,
        window: int | None = None,
        tower: TowerMethod | None = None,
    ) -> PruneSpec:
        """Finds the parts of a model and checks that the methods and the budget fit it.

        Raises:
            UnsupportedModelError: A part of the model was not found.
            MethodError: A need of the method that the model cannot meet.
            BudgetError: The budget cannot be met at the layers where the method cuts.
        """
        anatomy = _anatomy.find(model)
        if video_method is None:
            use = MethodUse.of(method, anatomy, budget)
            return cls((use,), budget, anatomy, _renumbers(method, anatomy, window), window, tower)
        kinds = list(anatomy.placeholders)
        if "video" not in kinds:
            raise MethodError(
                f"video_method was given, but {type(model).__name__} has no placeholder for clips (it has "
                f"{', '.join(kinds)}): to this model the frames of a clip are pictures, which method= prunes"
            )
        clips = frozenset({kinds.index("video")})
        uses = (
            MethodUse.of(method, anatomy, budget, frozenset(range(len(kinds))) - clips),
            MethodUse.of(video_method, anatomy, budget, clips, prefix="video/"),
        )
        renumbers = {_renumbers(each, anatomy, window) for each in (method, video_method)}
        if len(renumbers) > 1:
            raise MethodError(
                'one of the methods renumbers what it keeps (positions="compact") and the other does not; give both '
                "the same"
            )
        return cls(uses, budget, anatomy, renumbers.pop(), window, tower)

    @property
    def method(self) -> Method:
        """The method's instance; the one for pictures where there are two."""
        return self.uses[0].method

    @property
    def schedule(self) -> tuple[Stage, ...]:
        """Where it cuts this decoder."""
        return self.uses[0].schedule

    @property
    def taps(self) -> tuple[Tap, ...]:
        """What the methods record while the model runs."""
        return tuple(tap for use in self.uses for tap in use.taps)

    @property
    def method_names(self) -> str:
        """The methods' names, for reports."""
        return ", ".join(use.method.name or type(use.method).__name__ for use in self.uses)

    @cached_property
    def column_taps(self) -> frozenset[str]:
        """Names of the taps whose records follow the prompt's columns."""
        return frozenset(tap.name for tap in self.taps if tap.columns)

    @property
    def mean_ratio(self) -> float:
        """Expected mean share over layer inputs for `ratio` and `mean_ratio` budgets.

        Raises:
            VTPruneError: The budget is `keep` or an automatic ratio, or two methods cut at different depths.
        """
        if self.budget.auto is not None:
            raise VTPruneError('with ratio="auto" the mean ratio depends on the picture; see patch.last.mean_ratio')
        if self.budget.keep is not None:
            raise VTPruneError("with keep= the mean ratio depends on the prompt; see patch.last.mean_ratio")
        layers, means = self.anatomy.num_layers, set()
        for schedule in {use.schedule for use in self.uses}:
            ratio = self.budget.share or solve_mean(schedule, self.budget.mean_ratio or 1.0, layers)
            means.add(mean_share(schedule, stretch(schedule, ratio), layers))
        if len(means) > 1:
            raise VTPruneError(
                "pictures and clips are cut at different depths, so the mean ratio depends on the prompt; see "
                "patch.last.mean_ratio"
            )
        return means.pop()

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the decoder's embeddings, which masks are made in."""
        weight: torch.Tensor = self.anatomy.embeddings.weight  # type: ignore[assignment]
        return weight.dtype

    @property
    def attention_form(self) -> AttentionForm:
        """Which form of mask the decoder's attention takes; may change while the model is patched."""
        name = mask_function_name(self.anatomy.decoder.config)
        device = next(self.anatomy.decoder.parameters()).device
        return AttentionForm(name, self.dtype, device, self.anatomy.mixes_columns)

    @cached_property
    def work(self) -> Work:
        """What projector and decoder cost for a token."""
        parts = self.anatomy
        config = parts.decoder.config
        inside = parts.projector is None or any(m is parts.projector for m in parts.vision_tower.modules())
        projector = 0 if inside else weights_per_token(parts.projector)  # type: ignore[arg-type]
        layers = tuple(weights_per_token(layer, config) for layer in parts.layers)
        return Work(layers, self.shape.width, projector)

    @property
    def shape(self) -> DecoderShape:
        """Sizes of the decoder that its costs follow from."""
        return DecoderShape.of(self.anatomy.decoder.config, torch.empty((), dtype=self.dtype).element_size())


def _renumbers(method: Method, anatomy: Anatomy, window: int | None) -> bool:
    """Whether the method wants survivors renumbered; raises where the model's positions have several axes."""
    policy = getattr(method, "positions", "original")
    if policy not in ("original", "compact"):
        raise MethodError(f'{type(method).__name__}.positions is {policy!r}; expected "original" or "compact"')
    rope = rope_parameters(anatomy.decoder.config)
    if policy == "compact" and "mrope_section" in str(rope):
        raise MethodError(
            'positions="compact" numbers tokens on one axis, but this model places them by time, height and '
            'width; use positions="original"'
        )
    if policy == "compact" and window is not None:
        raise MethodError(
            'positions="compact" numbers what is left after a cut, and with window= more leaves later; use '
            'positions="original"'
        )
    return policy == "compact"
