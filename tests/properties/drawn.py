# SPDX-License-Identifier: Apache-2.0
"""Hypothesis strategies for prompts, methods (with options and stages) and budgets.

Methods come from the registry, options from their annotations, so new ones are included automatically.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from families import FAMILIES, LAYERS, Family, Image, Part, Video
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

import vtprune
from vtprune import methods, towers
from vtprune.core.clips import TwoCuts
from vtprune.core.ragged import top_k
from vtprune.methods import Choice, Method, ScoreMethod, Stage, Tokens

CASES = int(os.environ.get("VTPRUNE_CASES", "200"))
MAX_SAMPLES, MAX_IMAGES = 4, 5

# Double precision: matrix products of a batch and of a single sample round differently, which in float32 could swap
# two nearly equal scores.
DTYPE = torch.float64

# Options under which the properties do not hold: a minimum over the batch, a count other than the budget, norms of
# rotated keys (they change with the padding, as these calls pass no position ids), a class token that most towers lack.
_LEFT_OUT = {"scale_over", "exact", "rope", "keep_class_token"}


def profile(cases: int, **others: Any) -> settings:
    """Settings for `cases` examples, derandomized unless `others` override it."""
    return settings(
        **{
            "max_examples": cases,
            "derandomize": True,
            "deadline": None,
            "database": None,
            "suppress_health_check": list(HealthCheck),
            "print_blob": True,
            **others,
        }
    )


@cache
def model_of(family: str) -> torch.nn.Module:
    """The family's model in double precision."""
    return FAMILIES[family].build(dtype=DTYPE)


@dataclass
class Drawn(Method):
    """Keeps the tokens of largest norm, at random stages; optionally merges."""

    stages: tuple[Stage, ...] = (Stage(0, 0.5),)
    merges: bool = False

    def schedule(self, num_layers: int) -> tuple[Stage, ...]:
        return self.stages

    def choose(self, tokens: Tokens) -> Choice:
        keep = top_k(tokens.hidden.norm(dim=-1), tokens.offsets, tokens.budgets)
        return Choice(keep, tokens.hidden * 0.5 + 0.1 if self.merges else None)


@dataclass(frozen=True)
class Case:
    """One example: a model, a prompt, a method, a budget, and on some examples a cut tower."""

    family: str
    prompts: tuple[tuple[Part, ...], ...]
    padding: str
    method: Method
    budget: tuple[str, Any]
    seed: int
    tower: towers.TowerMethod | None

    @property
    def make(self) -> Family:
        return FAMILIES[self.family]


@st.composite
def prompts(draw: Any, family: str) -> tuple[Part, ...]:
    """Text anywhere, and 0 to 5 pictures (and clips, where the family accepts them) of different sizes."""
    kinds = [Image] if FAMILIES[family].video is None else [Image, Image, Image, Video]
    out: list[Part] = []
    for _ in range(draw(st.sampled_from([0, 1, 1, 1, 2, 2, 3, 4, MAX_IMAGES]))):
        kind = draw(st.sampled_from(kinds))
        # OneVision takes clips of one length in a batch: those of sizes 0 and 1 have three frames.
        largest = 1 if kind is Video and family == "llava_onevision" else 3
        out += [draw(st.integers(0, 6)), kind(draw(st.integers(0, largest)))]
    return tuple(part for part in (*out, draw(st.integers(0, 8))) if part != 0)


@cache
def accepted(family: str) -> tuple[str, ...]:
    """Registered methods that accept the family's model."""
    names = []
    for name in methods.for_pictures():
        if _accepts(family, methods.get(name), {}):
            names.append(name)
    return tuple(names)


@cache
def _hosts(family: str, name: str) -> tuple[str, ...]:
    """Methods that a wrapper accepts as `host=` with default options."""
    out = []
    for host in accepted(family):
        if host != name and issubclass(methods.get(host), ScoreMethod):
            try:
                methods.get(name)(host=methods.get(host)())  # type: ignore[call-arg]
            except vtprune.MethodError:
                continue
            out.append(host)
    return tuple(out)


def _is_mrope(family: str) -> bool:
    return "mrope_section" in str(vtprune.inspect(model_of(family)).decoder.config.rope_parameters)


@cache
def _choices(cls: type[Method], family: str) -> dict[str, Sequence[Any]]:
    """Options with a finite set of values, and those of these values that the family's model accepts."""
    out: dict[str, Sequence[Any]] = {}
    for name, hint in get_type_hints(cls).items():
        if name in _LEFT_OUT or name not in {f.name for f in dataclasses.fields(cls)}:
            continue
        if get_origin(hint) is Literal:
            out[name] = get_args(hint)
        elif hint is bool:
            out[name] = (False, True)
    if _is_mrope(family):
        out.pop("positions", None)
    return {name: [v for v in values if _accepts(family, cls, {name: v})] for name, values in out.items()}


def _accepts(family: str, cls: type[Method], options: dict[str, Any]) -> bool:
    try:
        vtprune.patch(model_of(family), ratio=0.5, method=cls(**options)).remove()
    except vtprune.MethodError:
        return False
    return True


@st.composite
def methods_with_options(draw: Any, family: str, name: str) -> Method:
    """A method by name, with a stage of its own (layer or layers) and up to two other options."""
    cls = methods.get(name)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    options: dict[str, Any] = {}
    if "layer" in fields:
        inside = issubclass(cls, TwoCuts)  # a second cut, which cannot be before the decoder
        options["layer"] = draw(st.none() | st.integers(1, LAYERS - 1) if inside else st.integers(0, LAYERS - 1))
    if "layers" in fields and "depth" in fields and draw(st.booleans()):
        count = len(fields["layers"].default)  # type: ignore[arg-type]
        layer = get_args(get_type_hints(cls, include_extras=True)["layers"])[0]
        lowest = layer.__metadata__[0].low  # of the declared range
        cuts = draw(st.lists(st.integers(lowest, LAYERS - 1), min_size=count, max_size=count, unique=True))
        options |= {"layers": tuple(sorted(cuts)), "depth": None}
    if "host" in fields:
        options["host"] = draw(methods_with_options(family, draw(st.sampled_from(_hosts(family, name)))))
    few = _choices(cls, family)
    if few:
        for option in draw(st.lists(st.sampled_from(sorted(few)), max_size=2, unique=True)):
            options[option] = draw(st.sampled_from(few[option]))
    return cls(**options)


@st.composite
def schedules(draw: Any) -> Drawn:
    """Cuts before random layers, with decreasing shares."""
    layers = sorted(draw(st.sets(st.integers(0, LAYERS - 1), min_size=1, max_size=LAYERS)))
    shares = sorted(
        draw(st.lists(st.integers(5, 95), min_size=len(layers), max_size=len(layers), unique=True)), reverse=True
    )
    stages = tuple(Stage(layer, share / 100) for layer, share in zip(layers, shares, strict=True))
    return Drawn(stages, draw(st.booleans()))


@st.composite
def budgets(draw: Any, method: Method) -> tuple[str, Any]:
    kind = draw(st.sampled_from(["ratio", "ratio", "keep", "mean_ratio"]))
    if kind == "keep":
        return kind, draw(st.integers(1, 80))
    if kind == "ratio":
        return kind, draw(st.one_of(st.just(1.0), st.floats(0.005, 0.95)))
    least = next(iter(method.schedule(LAYERS))).layer / LAYERS  # layers before the first cut run on all tokens
    return kind, draw(st.floats(least + 0.03, 0.97)) if least < 0.9 else 0.97


@st.composite
def tower_methods(draw: Any) -> towers.TowerMethod:
    """A tower method with a share or number of merge groups, before any block."""
    cls = draw(st.sampled_from([towers.Similar, towers.Pixels, towers.Change, towers.Attention, towers.Uniform]))
    return cls(keep=draw(st.floats(0.1, 0.9) | st.integers(1, 30)))


@st.composite
def cases(draw: Any, family: str) -> Case:
    name = draw(st.sampled_from([*accepted(family), "drawn schedule"]))
    method = draw(schedules()) if name == "drawn schedule" else draw(methods_with_options(family, name))
    return Case(
        family,
        tuple(draw(st.lists(prompts(family), min_size=1, max_size=MAX_SAMPLES))),
        draw(st.sampled_from(["left", "right"])),
        method,
        draw(budgets(method)),
        draw(st.integers(0, 3)),
        draw(tower_methods()) if draw(st.sampled_from([False, False, True])) else None,
    )
