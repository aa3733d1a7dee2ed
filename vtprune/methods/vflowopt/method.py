# SPDX-License-Identifier: Apache-2.0
"""VFlowOpt: cuts by an importance map of the vision encoder, once before the decoder and twice inside."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from ...core.files import FileError, read_json, write_text
from ...core.method import Choice, Group, Method, Stage, Tap
from ...core.options import Range, from_json
from ...core.ragged import top_k
from ...core.registry import register
from ...core.taps import layer_input, mean_of_streams
from ...core.tokens import Tokens
from ...errors import MethodError
from ...vision.tower import Vision, layer_tap, projector_tap
from .grid_recycling import recycle_single_images
from .importance_map import importance_map

if TYPE_CHECKING:
    from ...models.anatomy import Anatomy

_INPUT = "vflowopt.input"
# Schema of each option in a strategy file; the ranges are checked by the class.
_SAVED: dict[str, Any] = {
    **dict.fromkeys(("threshold", "alpha", "grid", "first"), {"type": "number"}),
    "later": {"type": "array", "items": {"type": "number"}, "maxItems": 100},
    "layers": {"type": "array", "items": {"type": "integer"}, "maxItems": 100},
    "depth": {"type": ["integer", "null"]},
}
_Kept = Annotated[float, Range(0, 1, open=(0,))]
_Layer = Annotated[int, Range(1, 10_000)]
# Released strategies by mean retention: t, alpha, a, retention of the first cut, ratios of the cuts in the decoder.
_RELEASED = {
    0.5: (28.683, 0.0, 11.757, 0.72332, 0.74875, 0.487),
    0.25: (34.760, 0.0, 15.581, 0.26510, 0.98334, 0.87733),
    0.1: (39.265, 0.0, 17.387, 0.11662, 1.0, 0.6011),
}


@register("vflowopt")
@dataclass
class VFlowOpt(Method):
    """Cuts by an importance map of the vision encoder: once with recycling before the decoder, twice inside.

    Paper: VFlowOpt, arXiv 2508.05211 (ICCV 2025), method section; `vtprune.study.tune` searches strategies. Reads
    queries and keys of the vision layer whose output is projected. With the attention `A` of a crop, mean over heads,
    and `R` the tokens that receive more than `t` times the mean, `I_i = mean_{k in R} A_ki + alpha softmax(entropy)_i`.
    Newlines have importance 1. First cut: the least important tokens are marked; the marked ones of each `a x a` cell
    of the grid are merged, weighted by importance, at the place of the most important of them. Before layers 9/28 and
    18/28 of the decoder the least important tokens are dropped. Each image or clip has its own budget.

    Differences from the release: it marks a fixed number and reserves `int(N / a^2)` places for merged tokens, so that
    the count is only approximate; here as many are marked as leave the exact budget after merging, and cells grow where
    there are more of them than tokens to keep. Newlines are never merged. Where no token reaches the threshold all rows
    count (there nothing is averaged). As released, recycling is for a single image per sample, not for videos or
    several images. In a tower with a class token the mean runs over patches. Cuts in the decoder go by shares of the
    original count, so a count can be one off where the release rounds twice.

    Attributes:
        preset: Released strategy that gives the defaults below: 0.5, 0.25 or 0.1, the mean share of tokens that it
            keeps in LLaVA-OneVision-7B (its schedule is scaled to other budgets).
        threshold, alpha, grid: `t`, `alpha` (0 in all releases) and `a`.
        first, later: Share that the first cut keeps, and share of the tokens before it that each later cut keeps.
        layers: Cuts in the decoder, as layers of one with `depth` layers, scaled to the actual depth.
        depth: Decoder depth that `layers` refers to; None uses them unscaled.
        recycle: Merge the tokens that the first cut drops.
        positions: `"compact"` renumbers the kept tokens 0, 1, 2, ... after every cut (the release: only after the
            first); by default they keep their position ids. Not for models with position ids on several axes (M-RoPE).
    """

    differentiable = True
    group: ClassVar[Group] = "image"
    preset: float = 0.25
    # Bounds are wide: beyond them numbers overflow, or nothing can be meant.
    threshold: Annotated[float, Range(0, 1e6)] | None = None
    alpha: Annotated[float, Range(-1e6, 1e6)] | None = None
    grid: Annotated[float, Range(0, 1e6, open=(0,))] | None = None
    first: _Kept | None = None
    later: tuple[_Kept, ...] | None = None
    layers: tuple[_Layer, ...] = (9, 18)
    depth: _Layer | None = 28
    recycle: bool = True
    positions: Literal["original", "compact"] = "original"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.preset not in _RELEASED:
            raise MethodError(f"VFlowOpt.preset is {self.preset!r}; expected one of {', '.join(map(str, _RELEASED))}")
        t, alpha, grid, first, *later = _RELEASED[self.preset]
        self.threshold = t if self.threshold is None else self.threshold
        self.alpha = alpha if self.alpha is None else self.alpha
        self.grid = grid if self.grid is None else self.grid
        self.first = first if self.first is None else self.first
        self.later = tuple(later) if self.later is None else tuple(self.later)
        if len(self.later) > len(self.layers):
            raise MethodError(f"{self}: expected at least as many layers as the {len(self.later)} shares of later")

    def save(self, path: str | Path, **about: Any) -> None:
        """Writes the strategy as JSON, with the further fields `about` it."""
        options = {"method": self.name} | {name: getattr(self, name) for name in _SAVED}
        write_text(path, json.dumps(options | {"about": about}, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path, **options: Any) -> VFlowOpt:
        """Reads a strategy that `save` or `vtprune tune` wrote.

        Args:
            path: The file.
            options: Other options, `recycle` or `positions`.

        Raises:
            MethodError: The file is missing or is not a strategy.
        """
        needed = {"method": {"const": cls.name}, **_SAVED}
        properties = {**needed, "about": {"type": "object"}}
        schema = {"type": "object", "required": [*needed], "properties": properties, "additionalProperties": False}
        try:
            data = read_json(path, schema)
            return cls(**from_json({name: data[name] for name in _SAVED}), **options)
        except (FileError, MethodError) as error:
            source = f"strategy of {cls.name}, such as `vtprune tune` writes"
            raise MethodError(f"{path} holds no {source}: {error}") from error

    def cuts(self, num_layers: int) -> list[int]:
        """Layers of the later cuts; in a shallow decoder several can coincide, or be layer 0."""
        layers = self.layers[: len(self.later or ())]
        return [layer if self.depth is None else num_layers * layer // self.depth for layer in layers]

    def schedule(self, num_layers: int) -> tuple[Stage, ...]:
        assert self.first is not None and self.later is not None
        stages, share = [Stage(0, self.first)], self.first
        for layer, ratio in zip(self.cuts(num_layers), self.later, strict=True):
            share *= ratio
            if layer == stages[-1].layer:  # a decoder too short for both cuts
                stages.pop()
            stages.append(Stage(layer, share))
        return tuple(stages)

    def taps(self, anatomy: Anatomy) -> Iterable[Tap]:
        # Where the first cut drops no token, the map is computed at a later one, from the inputs of the decoder.
        states = Tap(_INPUT, anatomy.layers[0], layer_input, columns=True)
        return (projector_tap(anatomy, self.name), layer_tap(anatomy, "feature"), states)

    def choose(self, tokens: Tokens) -> Choice:
        starts, table = tokens.memory.get("vflowopt") or self._remember(tokens)
        scores = table[starts[tokens.sample] + tokens.index]
        keep = top_k(scores, tokens.offsets, tokens.budgets)
        if tokens.stage or tokens.layer or not self.recycle:
            return Choice(keep, scores=scores)
        assert self.grid is not None
        return Choice(keep, recycle_single_images(tokens, scores, keep, self.grid), scores)

    def _remember(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Stores the importance of all visual tokens of the prefill for the cuts in the decoder."""
        assert self.threshold is not None and self.alpha is not None
        if tokens.layer:
            states = mean_of_streams(tokens.recorded[_INPUT][0], tokens.hidden.shape[1])
            tokens = replace(tokens, hidden=states)
        table = importance_map(Vision(tokens, self.name), self.threshold, self.alpha)
        counts = torch.bincount(tokens.sample)
        tokens.memory["vflowopt"] = (counts.cumsum(0) - counts, table)
        return tokens.memory["vflowopt"]
