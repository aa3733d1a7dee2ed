# SPDX-License-Identifier: Apache-2.0
"""VFlowOpt: an importance map from the vision encoder drives a first cut with recycling and two cuts in the decoder."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from ..errors import MethodError
from ..grid_recycling import grid_cells, mark_exactly, recycle
from ..selection import segment_ids, top_k
from ..vision import Attention, Vision, layer_tap, pixel_crops, projector_tap
from .base import Choice, Method, Pool, Stage, Tap, Tokens
from .options import check_choices
from .registry import register

if TYPE_CHECKING:
    from ..anatomy import Anatomy

_INPUT = "vflowopt.input"
# Released strategies by mean retention: t, alpha, a, retention of the first cut, ratios of the cuts in the decoder.
_RELEASED = {
    0.5: (28.683, 0.0, 11.757, 0.72332, 0.74875, 0.487),
    0.25: (34.760, 0.0, 15.581, 0.26510, 0.98334, 0.87733),
    0.1: (39.265, 0.0, 17.387, 0.11662, 1.0, 0.6011),
}


def selected_rows(received: Tensor, part: Tensor, t: float) -> Tensor:
    """Tokens that receive more than `t` times the mean of their part.

    Args:
        received: `[N]` mean attention received.
        part: `[N]` int64 crop of each token, -1 for tokens that do not count.
        t: Threshold factor.

    Returns:
        Tensor: `[N]` bool; all tokens of a part where none reaches the threshold (the release averages nothing there).
    """
    real = part >= 0
    parts = int(part.max()) + 1
    count = torch.bincount(part[real], minlength=parts)
    mean = received.new_zeros(parts).index_add_(0, part[real], received[real]) / count.clamp_min(1)
    chosen = real & (received > t * mean[part])
    none = torch.bincount(part[chosen], minlength=parts) == 0
    return chosen | (real & none[part])


def patch_entropy(pixels: Tensor, patch: int) -> Tensor:
    """Entropy in bits of the grey levels of every patch, as released.

    Grey levels are the normalised pixels times 255, cut to whole numbers that wrap around at 256.

    Args:
        pixels: `[n, 3, H, W]`.
        patch: Side of a patch.

    Returns:
        Tensor: `[n, H / patch * W / patch]` float32.
    """
    levels = (pixels.float() * 255).trunc().long() % 256
    grey = (levels.float() * 0.3333).sum(1).round().long().clamp(0, 255)  # [n, H, W]
    cells = grey.unfold(1, patch, patch).unfold(2, patch, patch).flatten(3).flatten(1, 2)  # [n, P, patch * patch]
    share = torch.zeros(*cells.shape[:2], 256, device=pixels.device)
    share.scatter_add_(2, cells, torch.full(cells.shape, 1 / cells.shape[2], device=pixels.device))
    return -(share * torch.log2(share + 1e-10)).sum(2)


def cut(importance: Tensor, ratio: float) -> Tensor:
    """`[n]` bool after a cut in the decoder: `round(n (1 - ratio))` smallest go."""
    n = len(importance)
    kept = torch.tensor([n - round(n * (1 - ratio))])
    return top_k(importance, torch.tensor([0, n]), kept)


@register("vflowopt")
@dataclass
class VFlowOpt(Method):
    """An importance map from the vision encoder: one cut with recycling before the decoder, two by the same map inside.

    Paper: VFlowOpt, arXiv 2508.05211 (ICCV 2025), method section; `vtprune.tune` is the search for strategies. Reads
    queries and keys of the vision layer whose output is projected. With the attention `A` of a crop, mean over
    heads, and `R` the tokens that receive more than `t` times the mean, `I_i = mean_{k in R} A_ki + alpha
    softmax(entropy)_i`. Newlines have importance 1. First cut: the least important tokens are marked; the marked ones
    of each `a x a` cell of the grid are merged, weighted by importance, and take the column of the most important of
    them. Before layers 9/28 and 18/28 of the decoder the least important go. Pool: the image, or the clip.

    Differences from the release: it marks a fixed number and reserves `int(N / a^2)` places for merged tokens, so that
    the kept count is only near the nominal one; here as many are marked as leave the exact budget after merging, and
    cells grow where there are more of them than tokens to keep. Newlines are never merged. Where no token reaches the
    threshold all rows count (the release averages nothing). As released, only a single image is recycled, not videos
    and not several images in a prompt. In a tower with a class token the mean runs over patches. Cuts in the decoder
    go by shares of the original count, so a count can be one off where the release rounds twice.

    Attributes:
        preset: Released strategy to take the following from: 0.5, 0.25 or 0.1, the mean share of tokens that it keeps
            in LLaVA-OneVision-7B (other budgets stretch its schedule).
        threshold, alpha, grid: `t`, `alpha` (0 in all releases) and `a`.
        first, later: Share that the first cut keeps, and what each cut in the decoder keeps of the tokens before it.
        layers: Cuts in the decoder, as layers of one with `depth` layers, scaled down to the decoder at hand.
        depth: Decoder length that `layers` refers to; None takes them as they are.
        recycle: Merge what the first cut takes away.
        positions: `"compact"` renumbers the survivors 0, 1, 2, ... after every cut; by default they keep their
            positions. The release does something between: ids are made after the first cut, 0, 1, 2, ..., and these
            are kept at the later ones. Not for models that place tokens on several axes.
    """

    _SAVED: ClassVar[tuple[str, ...]] = ("threshold", "alpha", "grid", "first", "later", "layers", "depth")

    pool: ClassVar[Pool] = "image"
    preset: float = 0.25
    threshold: float | None = None
    alpha: float | None = None
    grid: float | None = None
    first: float | None = None
    later: tuple[float, ...] | None = None
    layers: tuple[int, ...] = (9, 18)
    depth: int | None = 28
    recycle: bool = True
    positions: Literal["original", "compact"] = "original"

    def __post_init__(self) -> None:
        check_choices(self)
        if self.preset not in _RELEASED:
            raise MethodError(f"preset is {self.preset!r}; expected one of {', '.join(map(str, _RELEASED))}")
        t, alpha, grid, first, *later = _RELEASED[self.preset]
        self.threshold = t if self.threshold is None else self.threshold
        self.alpha = alpha if self.alpha is None else self.alpha
        self.grid = grid if self.grid is None else self.grid
        self.first = first if self.first is None else self.first
        self.later = tuple(later) if self.later is None else tuple(self.later)
        if self.grid <= 0 or not all(0 < share <= 1 for share in (self.first, *self.later)):
            raise MethodError(f"{self}: expected a grid above 0, and shares in (0, 1]")
        if len(self.later) > len(self.layers):
            raise MethodError(f"{self}: expected a layer for each of the {len(self.later)} later ratios")

    def save(self, path: str | Path, **about: Any) -> None:
        """Writes the strategy as JSON, with whatever else is to be remembered `about` it."""
        strategy = {"method": self.name} | {name: getattr(self, name) for name in self._SAVED}
        Path(path).write_text(json.dumps(strategy | about, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path, **options: Any) -> VFlowOpt:
        """Reads a strategy that `save` or `vtprune tune` wrote.

        Args:
            path: The file.
            options: Other options, `recycle` or `positions`.

        Raises:
            MethodError: The file is missing, or holds no strategy.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            saved = {name: data[name] for name in cls._SAVED}
            saved |= {name: tuple(saved[name]) for name in ("later", "layers")}
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise MethodError(
                f"{path} holds no strategy of {cls.name}, such as `vtprune tune` writes: {error}"
            ) from error
        return cls(**saved, **options)

    def cuts(self, num_layers: int) -> list[int]:
        """Layers of the later cuts; in a shallow decoder several can meet, or lie before it."""
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
        # Where the first cut rounds to nothing, the map is made at a later one, from what the decoder was given.
        states = Tap(_INPUT, anatomy.layers[0], _first_state, columns=True)
        return (projector_tap(anatomy, self.name), layer_tap(anatomy, "feature"), states)

    def choose(self, tokens: Tokens) -> Choice:
        starts, table = tokens.memory.get("vflowopt") or self._remember(tokens)
        scores = table[starts[tokens.sample] + tokens.index]
        if tokens.stage or tokens.layer or not self.recycle:
            return Choice(top_k(scores, tokens.segments, tokens.budgets), scores=scores)
        keep = top_k(scores, tokens.segments, tokens.budgets)
        hidden = tokens.hidden
        firsts = tokens.sample[tokens.segments[:-1].clamp_max(len(tokens) - 1)]
        bounds = tokens.segments.tolist()
        for number, (start, stop, budget) in enumerate(zip(bounds, bounds[1:], tokens.budgets.tolist(), strict=False)):
            here = slice(start, stop)
            alone = int((firsts == firsts[number]).sum()) == 1
            if not alone or budget == stop - start or bool((tokens.frame[here] > 0).any()):
                continue
            cell = self._cells(tokens.row[here], tokens.col[here], tokens.crop[here], budget)
            marked = mark_exactly(scores[here], cell, budget)
            keep[here], merged, _, best = recycle(hidden[here], scores[here], cell, marked)
            hidden = hidden.clone() if hidden is tokens.hidden else hidden
            hidden[start + best] = merged[best].to(hidden)
        return Choice(keep, None if hidden is tokens.hidden else hidden, scores)

    def _cells(self, row: Tensor, col: Tensor, crop: Tensor, budget: int) -> Tensor:
        """Cells of the grid, doubled in side until there are no more of them than tokens to keep."""
        assert self.grid is not None
        a = self.grid
        while True:
            cell = grid_cells(row, col, crop, a)
            if int(cell.max()) < budget:
                return cell
            if a > max(int(row.max()), int(col.max())):
                return torch.full_like(cell, -1)  # more crops than tokens to keep: nothing is merged
            a *= 2

    def _remember(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """The importance of all visual tokens of the prefill, kept for the cuts in the decoder."""
        if tokens.layer:
            tokens = replace(tokens, hidden=tokens.observed[_INPUT][0])
        vision = Vision(tokens, self.name)
        table = vision.tokens_of_patches(self._map)
        if self.alpha:
            table = table + self.alpha * vision.carry(self._entropy(vision))
        table = table.nan_to_num(1.0)  # newlines
        counts = torch.bincount(tokens.sample)
        starts = counts.cumsum(0) - counts
        tokens.memory["vflowopt"] = (starts, table)
        return starts, table

    def _map(self, attention: Attention) -> Tensor:
        assert self.threshold is not None
        batch, length = attention.query.shape[0], attention.query.shape[2]
        device = attention.query.device
        if attention.segments is None:
            part = torch.arange(batch, device=device)[:, None].repeat(1, length)
        else:
            part = segment_ids(attention.segments.to(device))[None]
        part[:, : attention.prefix] = -1
        if attention.valid is not None:
            part = torch.where(attention.valid, part, -1)
        rows = selected_rows(attention.received().flatten(), part.flatten(), self.threshold)
        return attention.received(rows.view(batch, length))

    def _entropy(self, vision: Vision) -> list[Tensor]:
        return [
            torch.softmax(patch_entropy(pixels, pixels.shape[-1] // math.isqrt(x.shape[1])), 1)
            for pixels, (x, _, _) in zip(pixel_crops(vision), vision.calls(), strict=True)
        ]


def _first_state(args: tuple, kwargs: dict, output: object) -> Tensor:
    return kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
