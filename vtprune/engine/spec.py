# SPDX-License-Identifier: Apache-2.0
"""Methods, budget and model of a patch, fixed when the model is patched."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar, get_args

import torch
from torch import Tensor, nn

from ..core.budget import Budget, check_schedule, mean_share, solve_mean, stretch
from ..core.method import Group, Method, Stage, Tap, name_of
from ..core.options import fits, shorten
from ..errors import MethodError, VTPruneError
from ..models import anatomy as _anatomy
from ..models.anatomy import Anatomy
from ..models.transformers_names import layer_configs, mask_function_name, rope_parameters
from ..report.cost import DecoderShape
from ..report.tower import Work, weights_per_token
from ..towers import TowerMethod
from .masks import AttentionForm

Kind = TypeVar("Kind")


@dataclass(frozen=True)
class MethodUse:
    """A method, with its cuts and taps in one model, and the kinds of visual tokens that it prunes.

    Attributes:
        method: The method's instance.
        schedule: Its cuts in the decoder.
        taps: Its taps, with names that begin with `prefix`.
        kinds: Numbers of the kinds of visual tokens that it prunes, among the anatomy's placeholders; None for all.
        prefix: Distinguishes the records of two methods.
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
        """Checks that a method and a budget fit a model; raises the same errors as `PruneSpec.of`."""
        layers, name = anatomy.num_layers, type(method).__name__
        if method.group not in get_args(Group):
            raise MethodError(f"{name}.group is {method.group!r}; expected {' or '.join(map(repr, get_args(Group)))}")
        schedule = _listed(method.schedule(layers), Stage, f"{name}.schedule")
        check_schedule(schedule, layers, name)
        for layer in _listed(method.required_layer_inputs(layers), int, f"{name}.required_layer_inputs"):
            if not 0 <= layer < layers:
                raise MethodError(f"{name} reads layer {layer}; expected a layer from 0 to {layers - 1}")
        if budget.mean_ratio is not None:
            solve_mean(schedule, budget.mean_ratio, layers)  # raises if it cannot be met
        taps = _listed(method.taps(anatomy), Tap, f"{name}.taps")
        for tap in taps:
            if not isinstance(tap.module, nn.Module) or not callable(tap.record):
                raise MethodError(f"{name}.taps returned {tap!r}; expected a module of the model and a function")
        return cls(method, schedule, tuple(replace(tap, name=prefix + tap.name) for tap in taps), kinds, prefix)

    @cached_property
    def tap_names(self) -> frozenset[str]:
        """Names of the method's records."""
        return frozenset(tap.name for tap in self.taps)

    def members(self, kind: Tensor) -> Tensor:
        """Numbers `[m]` of the visual tokens that it prunes, from the kind `[M]` of each."""
        if self.kinds is None:
            return torch.arange(len(kind))
        return torch.isin(kind, torch.tensor(sorted(self.kinds))).nonzero()[:, 0]


@dataclass(frozen=True, eq=False)  # specs are keys of caches
class PruneSpec:
    """Methods, budget and model of a patch.

    Attributes:
        uses: The method, or the one for pictures and the one for clips.
        budget: Number of visual tokens to keep.
        anatomy: The parts of the model.
        renumbers: Whether kept tokens get consecutive position ids.
        window: Largest number of visual tokens of a sample in a cache after a prefill; None for no limit.
        tower: Method that cuts inside the vision tower, or None.
    """

    uses: tuple[MethodUse, ...]
    budget: Budget
    anatomy: Anatomy
    renumbers: bool
    window: int | None = None
    tower: TowerMethod | None = None

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
            UnsupportedModelError: A part of the model was not found, or its structure is not supported.
            MethodError: The model does not meet a requirement of the method.
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
                f"{', '.join(kinds)}): it takes the frames of a clip as pictures, which method= prunes; leave it out"
            )
        clips = frozenset({kinds.index("video")})
        uses = (
            MethodUse.of(method, anatomy, budget, frozenset(range(len(kinds))) - clips),
            MethodUse.of(video_method, anatomy, budget, clips, prefix="video/"),
        )
        renumbers = {_renumbers(each, anatomy, window) for each in (method, video_method)}
        if len(renumbers) > 1:
            raise MethodError(
                'one of the methods renumbers kept tokens (positions="compact") and the other does not; set the same '
                "`positions` for both"
            )
        return cls(uses, budget, anatomy, renumbers.pop(), window, tower)

    def with_method(self, method: Method, budget: Budget) -> PruneSpec:
        """Returns this specification with another method, for one request.

        Hooks stay those of the patch's method, so the other one must not need any that are missing.

        Raises:
            MethodError: The method needs hooks of its own, or position ids that the patch does not give; or the
                patch has a second method for clips.
            BudgetError: The budget cannot be met at the layers where the method cuts.
        """
        if len(self.uses) > 1:
            raise MethodError("using(method=...) replaces one method; this patch has another one for clips beside it")
        use = MethodUse.of(method, self.anatomy, budget)
        if _are_equal(method, self.method) and use.schedule == self.schedule:
            return self
        name = name_of(method)
        if use.taps:
            raise MethodError(
                f"{name} reads what passes inside the model, with hooks that only vtprune.patch(model, method=...) "
                "attaches; patch the model with it, or choose a method here that reads hidden states or the layer at "
                "the cut, such as 'resprune' or 'iwp'"
            )
        if _renumbers(method, self.anatomy, self.window) != self.renumbers:
            raise MethodError(
                f'{name} and {self.method_names} differ in positions ("compact" renumbers what is kept); give both the '
                "same"
            )
        return replace(self, uses=(use,))

    @property
    def method(self) -> Method:
        """The method's instance; of two, the one for pictures."""
        return self.uses[0].method

    @property
    def schedule(self) -> tuple[Stage, ...]:
        """Its cuts in this decoder."""
        return self.uses[0].schedule

    @property
    def taps(self) -> tuple[Tap, ...]:
        """Taps of all methods."""
        return tuple(tap for use in self.uses for tap in use.taps)

    @property
    def method_names(self) -> str:
        """The methods' names, for reports."""
        return ", ".join(name_of(use.method) for use in self.uses)

    @cached_property
    def column_taps(self) -> frozenset[str]:
        """Names of the taps whose records are cut together with the prompt."""
        return frozenset(tap.name for tap in self.taps if tap.columns)

    @cached_property
    def read_layers(self) -> frozenset[int]:
        """Decoder layers that are cut, or whose queries, keys or values a method may read."""
        layers = self.anatomy.num_layers
        read = {layer for use in self.uses for layer in use.method.required_layer_inputs(layers)}
        return frozenset(read | {stage.layer for use in self.uses for stage in use.schedule})

    @property
    def mean_ratio(self) -> float:
        """Expected share of visual tokens, averaged over layer inputs, for `ratio` and `mean_ratio` budgets.

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
        """Dtype of the decoder's embeddings, and of float masks."""
        weight: torch.Tensor = self.anatomy.embeddings.weight  # type: ignore[assignment]
        return weight.dtype

    def attention_form(self) -> AttentionForm:
        """The form of mask that the decoder's attention takes; it may change while the model is patched."""
        name = mask_function_name(self.anatomy.decoder.config)
        device = next(self.anatomy.decoder.parameters()).device
        return AttentionForm(name, self.dtype, device, self.anatomy.layers_both_ways)

    @cached_property
    def work(self) -> Work:
        """Cost of a token in projector and decoder."""
        parts = self.anatomy
        configs = layer_configs(parts.decoder.config, parts.num_layers)
        inside = parts.projector is None or any(m is parts.projector for m in parts.vision_tower.modules())
        projector = 0 if inside else weights_per_token(parts.projector)  # type: ignore[arg-type]
        layers = tuple(map(weights_per_token, parts.layers, configs))
        return Work(layers, self.shape.width, projector)

    @property
    def shape(self) -> DecoderShape:
        """Sizes of the decoder from which its costs are computed."""
        parts, itemsize = self.anatomy, torch.empty((), dtype=self.dtype).element_size()
        return DecoderShape.of(parts.decoder.config, parts.num_layers, itemsize)


def _listed(values: Iterable[Kind], kind: type[Kind], source: str) -> tuple[Kind, ...]:
    """What a method's function returned, as a tuple; raises `MethodError` unless all are of a type."""
    found = tuple(values) if isinstance(values, Iterable) else None
    if found is None or not all(fits(value, kind) for value in found):
        raise MethodError(f"{source} returned {shorten(values)}; expected a list of {kind.__name__}")
    return found


def _are_equal(one: Method, other: Method) -> bool:
    """Whether two methods are of the same class and have equal options."""
    try:
        return one is other or (type(one) is type(other) and bool(one == other))
    except (RuntimeError, TypeError, ValueError):  # options such as tensors, which `==` does not reduce to one answer
        return False


def _renumbers(method: Method, anatomy: Anatomy, window: int | None) -> bool:
    """Whether the method renumbers kept tokens; raises if the model's positions have several axes."""
    policy = getattr(method, "positions", "original")
    if policy not in ("original", "compact"):
        raise MethodError(f'{type(method).__name__}.positions is {policy!r}; expected "original" or "compact"')
    if policy == "original":
        return False
    if "mrope_section" in str(rope_parameters(anatomy.decoder.config)):
        raise MethodError(
            'positions="compact" numbers tokens on one axis, but positions of this model have three (time, height and '
            'width); use positions="original"'
        )
    if window is not None:
        raise MethodError(
            'positions="compact" renumbers the tokens left after a cut, and window= drops more of them later; use '
            'positions="original"'
        )
    return True
