# SPDX-License-Identifier: Apache-2.0
"""Token counts per group and stage, from `ratio`, `keep` or `mean_ratio` and a method's schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Literal

from ..errors import BudgetError, MethodError
from .energy import Auto
from .frame_budget import frame_budgets
from .method import Stage
from .options import fits, shorten


@dataclass(frozen=True)
class Budget:
    """The number of visual tokens that a user asks for; exactly one field is set.

    Attributes:
        ratio: Share of the visual tokens that reaches the last layer, in (0, 1]; or an `Auto`, which chooses one for
            each picture. `"auto"` becomes `Auto()`.
        keep: Number of visual tokens per sample that reaches the last layer.
        mean_ratio: Share of the visual tokens that is left, averaged over the inputs of the decoder layers, in (0, 1].
    """

    ratio: float | Auto | Literal["auto"] | None = None
    keep: int | None = None
    mean_ratio: float | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) != 1:
            raise BudgetError(
                f"give exactly one of ratio, keep and mean_ratio; got {', '.join(given) if given else 'none of them'}"
            )
        name, value = next(iter(given.items()))
        if name == "ratio" and isinstance(value, str) and value == "auto":
            object.__setattr__(self, "ratio", Auto())
        elif name == "ratio" and isinstance(value, Auto):
            pass
        elif name == "keep":
            if not fits(value, int) or value < 1:
                raise BudgetError(f"keep is {shorten(value)}; expected a whole number of visual tokens, 1 or more")
            object.__setattr__(self, name, int(value))
        elif not fits(value, float) or not 0 < float(value) <= 1:
            raise BudgetError(
                f"{name} is {shorten(value)}; expected the share of visual tokens to keep, above 0 and up to 1 "
                "(0.1 keeps 10 %)"
            )
        else:
            object.__setattr__(self, name, float(value))

    @property
    def auto(self) -> Auto | None:
        """The `Auto` that chooses the ratio of each picture, or None."""
        return self.ratio if isinstance(self.ratio, Auto) else None

    @property
    def share(self) -> float | None:
        """`ratio` if it is a number, else None."""
        return self.ratio if isinstance(self.ratio, float) else None

    @property
    def may_drop(self) -> bool:
        """Whether the budget can drop visual tokens."""
        return self.auto is not None or self.keep is not None or (self.share or self.mean_ratio or 0) < 1

    def __str__(self) -> str:
        if self.auto is not None:
            return f"ratio={self.auto}"
        return next(f"{name}={value:g}" for name, value in vars(self).items() if value is not None)


def check_window(window: object) -> None:
    """Raises `BudgetError` unless `window` is a number of visual tokens."""
    if not fits(window, int) or window < 1:  # type: ignore[operator]
        raise BudgetError(f"window is {shorten(window)}; expected a whole number of visual tokens, 1 or more")


def check_schedule(stages: Sequence[Stage], num_layers: int, name: str) -> None:
    """Raises `MethodError` unless the cuts are before ascending layers of the model and have falling shares."""
    layers = [stage.layer for stage in stages]
    if any(not isinstance(layer, Integral) for layer in layers):
        raise MethodError(f"{name} cuts before layers {layers}; expected whole numbers of layers")
    if not layers or layers != sorted(set(layers)) or layers[0] < 0:
        raise MethodError(f"{name} cuts before layers {layers}; expected ascending layers from 0 on")
    if layers[-1] >= num_layers:
        raise MethodError(
            f"{name} cuts before layer {layers[-1]}, but the decoder has {num_layers} layers (0 to {num_layers - 1})"
        )
    shares = [stage.share for stage in stages]
    if any(not fits(share, float) or not 0 < share < 1 for share in shares) or shares != sorted(shares, reverse=True):
        raise MethodError(f"{name} has shares {shares}; expected falling shares between 0 and 1")


def mean_share(stages: Sequence[Stage], shares: Sequence[float], num_layers: int) -> float:
    """Share of visual tokens that is left, averaged over the inputs of the decoder layers."""
    edges = [0, *(stage.layer for stage in stages), num_layers]
    return sum(s * (b - a) for s, a, b in zip([1.0, *shares], edges, edges[1:], strict=False)) / num_layers


def stretch(stages: Sequence[Stage], ratio: float) -> list[float]:
    """Stretches published shares geometrically so that the last one is `ratio`."""
    power = math.log(ratio) / math.log(stages[-1].share)
    return [*(stage.share**power for stage in stages[:-1]), ratio]


def solve_mean(stages: Sequence[Stage], mean_ratio: float, num_layers: int) -> float:
    """The `ratio` at which the stretched schedule has mean share `mean_ratio`.

    Raises:
        BudgetError: The layers before the first cut alone exceed it.
    """
    if mean_ratio == 1:
        return 1.0
    least = stages[0].layer / num_layers
    if mean_ratio <= least:
        raise BudgetError(
            f"mean_ratio={mean_ratio:g} cannot be met: the first cut is before layer {stages[0].layer} of "
            f"{num_layers}, so the mean over layer inputs is above {least:.3f}; raise mean_ratio, or cut earlier"
        )
    low, high = -745.0, 0.0  # log of the ratio
    for _ in range(200):
        middle = (low + high) / 2
        if mean_share(stages, stretch(stages, math.exp(middle)), num_layers) < mean_ratio:
            low = middle
        else:
            high = middle
    found = math.exp((low + high) / 2)
    # Rounded, so that a single cut at layer 0 gets exactly `mean_ratio` and its counts round as those of `ratio` do.
    return round(found, 12) or found


def counts(stages: Sequence[Stage], ratio: float, total: int, last: int | None = None) -> list[int]:
    """Numbers of tokens of a group that are left after each stage.

    Args:
        stages: The schedule.
        ratio: Share that is left after the last stage.
        total: Number of tokens in the group.
        last: The final count, if it is given as a number.

    Returns:
        list[int]: Falling, never more than `total`; the last is `max(1, round(ratio * total))` or `last`.
    """
    if total == 0:
        return [0] * len(stages)
    final = max(1, round(ratio * total)) if last is None else last
    final = min(final, total)
    left, out = total, []
    for share in stretch(stages, ratio)[:-1]:
        left = max(final, min(left, round(share * total)))
        out.append(left)
    return [*out, final]


def split_keep(keep: int, sizes: Sequence[int], least: Sequence[int] = ()) -> list[int]:
    """Splits a sample's `keep` over its images in proportion to their sizes, by largest remainder.

    Images that would get fewer than their `least` get tokens of those that are furthest above their proportion.
    """
    out, total = frame_budgets(sizes, keep, sizes), sum(sizes)
    quota = [min(keep, total) * size / total for size in sizes]
    for i, floor in enumerate(least):
        while out[i] < floor and (above := [j for j in range(len(out)) if out[j] > least[j]]):
            out[max(above, key=lambda j: out[j] - quota[j])] -= 1
            out[i] += 1
    return out


def split_over_groups(
    keep: int, groups: Sequence[int], by_sample: Sequence[Sequence[int]], least: Sequence[int] = ()
) -> list[int]:
    """Number of tokens that each group keeps when each sample keeps `keep`.

    Args:
        keep: Tokens of a sample.
        groups: Visual tokens in each group.
        by_sample: For each sample, the numbers of its groups.
        least: Tokens that each group needs, which it gets from groups of its sample that need fewer.
    """
    out = [0] * len(groups)
    for members in by_sample:
        floors = [least[g] for g in members] if least else ()
        for group, number in zip(members, split_keep(keep, [groups[g] for g in members], floors), strict=True):
            out[group] = number
    return out


def plan(
    budget: Budget,
    stages: Sequence[Stage],
    num_layers: int,
    groups: Sequence[int],
    by_sample: Sequence[Sequence[int]],
    last: Sequence[int] | None = None,
) -> list[list[int]]:
    """Token counts for one prefill.

    Args:
        budget: The user's budget.
        stages: The method's schedule.
        num_layers: Decoder layers.
        groups: Visual tokens in each group.
        by_sample: For each sample, the numbers of its groups.
        last: Final count of each group, if known: for automatic ratios, and for a `keep` that is shared with other
            groups than these. By default `keep` is split over these groups.

    Returns:
        list: For each stage, the number of tokens left in each group.
    """
    if last is None and budget.keep is not None:
        last = split_over_groups(budget.keep, groups, by_sample)
    if last is not None:
        per_group = [
            counts(stages, max(number, 0.5) / max(size, 1), size, number)
            for size, number in zip(groups, last, strict=True)
        ]
    else:
        ratio = budget.share or solve_mean(stages, budget.mean_ratio or 1, num_layers)
        per_group = [counts(stages, ratio, size) for size in groups]
    return [[group[stage] for group in per_group] for stage in range(len(stages))]
