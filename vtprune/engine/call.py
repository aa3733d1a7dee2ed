# SPDX-License-Identifier: Apache-2.0
"""State of one call of the decoder, from its first layer to its last."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..core.budget import Budget
from ..models import attention_probe
from ..models.arguments import hidden_states
from ..models.visual_tokens import VisualTokens
from . import kv_cache
from .columns import Columns
from .deepstack import DeepStackFeatures
from .spec import MethodUse, PruneSpec


@dataclass
class BudgetGroups:
    """The visual tokens of a call by budget group: a sample, or an image.

    Attributes:
        of_token: `[M]` group number of each visual token; -1 for those of other methods.
        sizes: Number of tokens in each group.
        by_sample: For each row of the batch that has visual tokens, the numbers of its groups.
    """

    of_token: Tensor
    sizes: list[int]
    by_sample: dict[int, list[int]]

    @classmethod
    def of(cls, visual: VisualTokens, by: str, members: Tensor) -> BudgetGroups:
        """Groups the tokens `members` `[m]` by "sample" or by "image"."""
        sample, image = visual.sample[members], visual.image[members]
        new = torch.ones(len(members), dtype=torch.bool)
        new[1:] = sample.diff() != 0
        if by == "image":
            new[1:] |= image.diff() != 0
        numbers = new.cumsum(0) - 1
        of_token = torch.full((len(visual),), -1)
        of_token[members] = numbers
        groups: dict[int, list[int]] = {}
        for group, row in enumerate(sample[new].tolist()):
            groups.setdefault(row, []).append(group)
        return cls(of_token, torch.bincount(numbers).tolist(), groups)

    def count(self, tokens: Tensor) -> list[int]:
        """Number of the given tokens `[m]` in each group."""
        if len(self.sizes) == 1 and self.sizes[0] == len(self.of_token):
            return [len(tokens)]
        numbers = self.of_token[tokens]
        return torch.bincount(numbers[numbers >= 0], minlength=len(self.sizes)).tolist()

    def shrinking(self, flat: Tensor, kept: Tensor) -> Tensor:
        """Mask `[M]` of the tokens `flat` whose group keeps fewer tokens than it has, given the tokens `kept`."""
        before, after = (torch.bincount(self.of_token[x], minlength=len(self.sizes)) for x in (flat, kept))
        return (after < before)[self.of_token[flat]]


@dataclass
class Selection:
    """The selection of one stage.

    Attributes:
        kept: `[M']` numbers of the kept tokens among all visual tokens of the call.
        merged: Numbers `[m]` of tokens that get new states, and the states `[m, D]`, for methods that merge; or None.
        scores: The method's scores of the tokens left before the stage; or None.
        states: Their states, if the call is recorded (`explain.recording`); or None.
    """

    kept: Tensor
    merged: tuple[Tensor, Tensor] | None = None
    scores: Tensor | None = None
    states: Tensor | None = None


@dataclass(frozen=True)
class MethodPlan:
    """The task of one method in a call: the tokens it prunes, and how many it keeps at each cut.

    Attributes:
        use: The method.
        groups: The tokens it prunes, by budget group.
        counts: Number of tokens left in each group, by the layer of the cut.
    """

    use: MethodUse
    groups: BudgetGroups
    counts: dict[int, list[int]]

    @property
    def members(self) -> Tensor:
        """Mask `[M]` of the visual tokens of the call that the method prunes."""
        return self.groups.of_token >= 0


@dataclass
class Snapshot:
    """Arguments of a layer just before it ran.

    Attributes:
        layer, args, kwargs: The layer and its arguments.
        index, valid: Its packed layout.
        cached_tokens: Number of tokens cached in it by then.
        watch: What the layer computed when it ran, if it did; otherwise its projections once it was probed.
        probed: What was read of it, without rotation and with it.
        checked: Whether all that methods read of it is known to be finite.
    """

    layer: nn.Module
    args: tuple
    kwargs: dict[str, Any]
    index: Tensor
    valid: Tensor
    cached_tokens: int
    watch: attention_probe.Watch = field(default_factory=attention_probe.Watch)
    probed: dict[bool, attention_probe.QKV] = field(default_factory=dict)
    checked: bool = False

    @classmethod
    def take(cls, call: CallState, number: int, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Snapshot:
        columns = call.columns
        return cls(layer, args, kwargs, columns.index, columns.valid, kv_cache.cached_tokens(columns.cache, number))

    @property
    def hidden(self) -> Tensor:
        """Hidden states `[B, K, D]` entering the layer."""
        return hidden_states(self.args, self.kwargs)

    def read(self, rope: bool) -> attention_probe.QKV:
        """Queries, keys and values of the layer, see `attention_probe.probe`; no projection is run twice for them."""
        seen = self.watch.whole(self.hidden.shape[1]) if rope else None
        if seen is not None:
            return seen
        if rope not in self.probed:
            kwargs = attention_probe.own_columns(self.kwargs, self.hidden.shape[1], self.cached_tokens)
            given = self.layer, self.args, kwargs
            both = None
            if not rope and len(self.hidden) == 1:  # methods that read keys before rotation often read both
                both = attention_probe.probe_both(*given, self.watch.projections)
            if both is not None:
                self.probed = dict(zip((False, True), both, strict=True))
            else:
                self.probed[rope] = attention_probe.probe(*given, rope, self.watch.projections)
        return self.probed[rope]


@dataclass(frozen=True)
class CallOptions:
    """Settings of a call besides its inputs.

    Attributes:
        budget: Number of visual tokens to keep.
        may_drop: Whether visual tokens may be dropped.
        question_end: Position at which the answer begins, see `Patch.question`; None if not given.
        arguments: Keyword arguments of the outermost model, such as labels.
        own_budget: Whether the call has a budget of its own, see `Patch.using`.
        generates: Whether `generate` runs the prompt: an answer ends it, and what comes later is another prompt.
    """

    budget: Budget
    may_drop: bool
    question_end: Any = None
    arguments: dict[str, Any] = field(default_factory=dict)
    own_budget: bool = False
    generates: bool = False


@dataclass
class CallState:
    """State of one call of the decoder.

    Attributes:
        spec: Methods, budget and model of the patch.
        options: Settings of the call.
        caches: The caches that the patch knows.
        columns: The positions that are left, from which the arguments of layers are made.
        visual: The visual tokens, or None if there are none to prune.
        inputs: Keyword arguments of the composite's call and of its encoders.
        real_past: `[B, past]` bool or None: positions in the cache that are not padding.
        embeds: `[B, T, D]` embeddings passed to the decoder, or None.
        memo: Selections of an earlier call without a cache that this one continues.
        deepstack: DeepStack features, if the decoder has them.
        recorded: Records of the method's taps.
        selection_time: Host seconds spent at the cuts.
        snapshots: Inputs of the layers that the method reads, by layer.
        selections: Selections of the stages so far.
        stages: Their layers.
        required: `[M]` bool, visual tokens whose outputs the caller reads, so that they have to stay; None for none.
        answer_starts: For each row, the position at which an answer begins; None if unknown.
        differentiable: Whether gradients of returned hidden states may be requested.
        cuts: Methods that cut before a layer, by layer.
        live: `[M]` bool, the visual tokens that no cut has dropped so far; set if there are visual tokens.
        memory: State that methods carry from stage to stage, by their prefix.
        selects: Whether a method is selecting tokens.
    """

    spec: PruneSpec
    options: CallOptions
    caches: kv_cache.Caches
    columns: Columns
    visual: VisualTokens | None
    inputs: dict[str, Any]
    real_past: Tensor | None = None
    embeds: Tensor | None = None
    memo: list[Selection] | None = None
    deepstack: DeepStackFeatures | None = None
    recorded: dict[str, list] = field(default_factory=dict)
    selection_time: float = 0.0
    snapshots: dict[int, Snapshot] = field(default_factory=dict)
    selections: list[Selection] = field(default_factory=list)
    stages: list[int] = field(default_factory=list)
    required: Tensor | None = None
    answer_starts: list[int] | None = None
    differentiable: bool = False
    cuts: dict[int, list[MethodPlan]] = field(default_factory=dict)
    live: Tensor = field(init=False)
    memory: dict[str, dict[str, Any]] = field(default_factory=dict)
    selects: bool = False
