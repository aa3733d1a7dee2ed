# SPDX-License-Identifier: Apache-2.0
"""VisionZip: the patches that the class token attends to, and a few merged tokens for the rest."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..core.log import warn_once
from ..core.method import Choice, Method, Stage, Tap
from ..core.options import Range
from ..core.ragged import first_equal, settle_ties
from ..core.registry import register
from ..core.tokens import Tokens
from ..vision.crops import by_crop
from ..vision.tower import Queries, Vision, layer_tap, projector_tap

if TYPE_CHECKING:
    from ..models.anatomy import Anatomy


def contextual_targets(rest: int, count: int) -> Tensor:
    """`[count]` indices into `rest` patches in raster order: every `rest // count`-th, from the first on."""
    return torch.arange(count) * max(1, rest // max(count, 1))


def assign(metric: Tensor, targets: Tensor) -> Tensor:
    """Assigns every patch to the target with the most similar key.

    Args:
        metric: `[n, d]` mean keys of the patches that are not dominant.
        targets: `[C]` rows of `metric`, each assigned to itself.

    Returns:
        Tensor: `[n]` index of the target.
    """
    unit = normalize(metric.float(), dim=-1)
    nearest = first_equal(unit[targets])[(unit @ unit[targets].T).argmax(1)]
    nearest[targets] = torch.arange(len(targets), device=targets.device)
    return nearest


def merge(features: Tensor, targets: Tensor, assignment: Tensor, average: bool = False) -> Tensor:
    """`[C, F]` contextual tokens: target + mean of the others assigned to it, as released, or the mean of all of them.

    Args:
        features: `[n, F]`.
        targets: `[C]` rows of `features`.
        assignment: `[n]` from `assign`.
        average: Use the mean of target and others.
    """
    features = features.float()
    others = torch.ones(len(features), device=features.device, dtype=torch.float32)
    others[targets] = 0
    total = features.new_zeros(len(targets), features.shape[1])
    total.index_add_(0, assignment, features * others[:, None])
    count = features.new_zeros(len(targets)).index_add_(0, assignment, others)[:, None]
    if average:
        return (features[targets] + total) / (1 + count)
    return features[targets] + total / count.clamp_min(1)


@register("visionzip")
@dataclass
class VisionZip(Method):
    """Keeps dominant patches by class-token attention plus merged contextual tokens, crop by crop.

    Paper: VisionZip, arXiv 2412.04467 (CVPR 2025), section 3.2. Stage: the projector, hence before the decoder. Reads
    queries and keys of the vision layer whose output is projected, and the features before the projector. Dominant: the
    largest class-token attention, summed over heads (without a class token the mean attention received). Contextual: of
    the remaining patches in raster order every `step`-th is a target, each other one joins the target with the most
    similar key (mean over heads), and the token is target + mean of the others, sent through the projector.

    Places: a contextual token takes the place of its target; with `keep_class_token` the class token takes the first
    free place of its crop.

    Differences from the release: the class token is not passed on (the projector never saw one in training) but counts
    as one more dominant patch, unless `keep_class_token`; tokens keep their order in the prompt (there contextual
    tokens come last); crops share the exact budget evenly, and any-resolution layouts keep their unpadding, newlines
    being dropped first; where a projector accepts whole images only, its outputs are averaged.

    Attributes:
        contextual: Share of the budget for contextual tokens (published: 10 of 64 and 20 of 128).
        keep_class_token: Pass the class token on, as released.
        average: Merge by averages; the released sum of two terms has about twice the norm.
        queries: Without a class token, the query rows that the mean attention received is taken over: `"auto"` takes
            all, and a stratified sample of 512 in pictures of 2,048 patches or more; a number takes that many.
        positions: `"compact"` renumbers the kept tokens 0, 1, 2, ..., as the release does; by default they keep their
            position ids. Not for models with position ids on several axes (M-RoPE).
    """

    differentiable = True
    contextual: Annotated[float, Range(0, 1, open=(1,))] = 10 / 64
    keep_class_token: bool = False
    average: bool = False
    queries: Queries = "auto"
    positions: Literal["original", "compact"] = "original"

    def schedule(self, num_layers: int) -> tuple[Stage, ...]:
        return (Stage(0, 64 / 576),)

    def taps(self, anatomy: Anatomy) -> Iterable[Tap]:
        return (projector_tap(anatomy, self.name), layer_tap(anatomy, "feature", self.keep_class_token))

    def choose(self, tokens: Tokens) -> Choice:
        vision = Vision(tokens, self.name)
        scores = vision.importance(queries=self.queries)
        metric = vision.tokens_of_patches(lambda a: a.key.float().mean(1), rope=False)  # [M, dh]
        keep = torch.zeros(len(tokens), dtype=torch.bool, device=scores.device)
        groups, class_rows = [], []
        for rows, budget, placed in by_crop(tokens, vision.crop).each():
            if not placed or budget == len(rows):
                keep[rows[:budget]] = True
                continue
            count = round(self.contextual * budget)
            with_class = self.keep_class_token and budget - count > 1
            by_score = settle_ties(scores[rows]).sort(descending=True, stable=True).indices
            keep[rows[by_score[: budget - count - with_class]]] = True  # the dominant patches
            rest = rows[~keep[rows]]
            if count:
                targets = contextual_targets(len(rest), count).to(rest.device)
                groups.append((rest, targets, assign(metric[rest], targets)))
                keep[rest[targets]] = True
            if with_class:
                class_rows.append(rows[~keep[rows]][:1])
                keep[class_rows[-1]] = True
        return Choice(keep, self._states(tokens, vision, groups, class_rows), scores)

    def _states(self, tokens: Tokens, vision: Vision, groups: list, class_rows: list[Tensor]) -> Tensor | None:
        """`[M, D]` states of the visual tokens with contextual and class tokens in place; None where there are none."""
        if not groups and not class_rows:
            return None
        changed = [rest[targets] for rest, targets, _ in groups] + class_rows
        before = vision.to_tokens(vision.features)
        states = [merge(before[rest], targets, belongs, self.average) for rest, targets, belongs in groups]
        if class_rows:
            assert vision.crop is not None  # towers that pack images have no class token
            states.append(vision.class_states()[vision.crop[torch.cat(class_rows)]].float())
        projected = vision.project(torch.cat(states))
        if projected is None:
            warn_once(f"{self.name}: the projector accepts whole images only, so its outputs are averaged instead")
            projected = torch.cat([merge(tokens.hidden[r], t, belongs, average=True) for r, t, belongs in groups])
        hidden = tokens.hidden.clone()
        hidden[torch.cat(changed)] = projected.to(hidden)
        return hidden
