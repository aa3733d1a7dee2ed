# SPDX-License-Identifier: Apache-2.0
"""What one call of the decoder knows, from its first layer to its last."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..core.budget import Budget
from ..models.visual_tokens import VisualTokens
from . import kv_cache
from .columns import Columns
from .deepstack import DeepStackFeatures
from .spec import MethodUse, PruneSpec


@dataclass
class BudgetGroups:
    """The visual tokens of a call, grouped as the method's budget asks.

    Attributes:
        of_token: `[M]` group number of each visual token; -1 for those of other methods.
        sizes: Tokens in each group.
        by_sample: For each row of the batch that has visual tokens, the numbers of its groups.
    """

    of_token: Tensor
    sizes: list[int]
    by_sample: dict[int, list[int]]

    @classmethod
    def of(cls, visual: VisualTokens, by: str, members: Tensor) -> BudgetGroups:
        """Makes a group of every sample, or of every image of a sample; of the tokens `members` `[m]` only."""
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
        """How many of some tokens `[m]` are in each group."""
        numbers = self.of_token[tokens]
        return torch.bincount(numbers[numbers >= 0], minlength=len(self.sizes)).tolist()

    def losing(self, flat: Tensor, kept: Tensor) -> Tensor:
        """`[M]` bool: which of the tokens `flat` are in groups of which fewer are `kept`."""
        before, after = (torch.bincount(self.of_token[x], minlength=len(self.sizes)) for x in (flat, kept))
        return (after < before)[self.of_token[flat]]


@dataclass
class Decision:
    """What was decided at one stage.

    Attributes:
        kept: `[M']` numbers of the surviving tokens among all visual tokens of the call.
        merged: Numbers `[m]` of tokens that get new states, and the states `[m, D]`, for methods that merge; or None.
        scores: The method's scores of the tokens that were alive; or None.
        states: Their states, where a call is recorded (`explain`); or None.
    """

    kept: Tensor
    merged: tuple[Tensor, Tensor] | None = None
    scores: Tensor | None = None
    states: Tensor | None = None


@dataclass
class MethodCall:
    """What one method has to do in a call: all visual tokens, or those of one kind.

    Attributes:
        use: The method.
        groups: The tokens it prunes, grouped as its budget asks.
        counts: Layer of each of its cuts -> tokens left in each group.
        memory: The method's own, from stage to stage.
    """

    use: MethodUse
    groups: BudgetGroups
    counts: dict[int, list[int]]
    memory: dict[str, Any] = field(default_factory=dict)

    @property
    def members(self) -> Tensor:
        """`[M]` bool: which visual tokens of the call the method prunes."""
        return self.groups.of_token >= 0


@dataclass
class Snapshot:
    """A layer's input as it was when the layer was about to run, and how many slots its cache cached_tokens then."""

    layer: nn.Module
    args: tuple
    kwargs: dict[str, Any]
    index: Tensor
    valid: Tensor
    cached_tokens: int

    @classmethod
    def take(cls, call: CallState, number: int, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Snapshot:
        columns = call.columns
        return cls(layer, args, kwargs, columns.index, columns.valid, kv_cache.cached_tokens(columns.cache, number))

    @property
    def hidden(self) -> Tensor:
        """`[B, K, D]` the hidden states entering the layer."""
        return self.kwargs["hidden_states"] if "hidden_states" in self.kwargs else self.args[0]


@dataclass(frozen=True)
class CallOptions:
    """What a call asks for beside its inputs.

    Attributes:
        budget: How many visual tokens stay.
        question_end: Where the caller says that an answer begins, see `Patch.question`.
        arguments: Keyword arguments of the outermost model, labels among them.
        own_budget: Whether the caller gave this call a budget of its own, see `Patch.using`.
    """

    budget: Budget
    question_end: Any = None
    arguments: dict[str, Any] = field(default_factory=dict)
    own_budget: bool = False


@dataclass
class CallState:
    """State of one call of the decoder.

    Attributes:
        spec: Whose method applies.
        options: Budget, question, and what the caller reads.
        caches: The caches that the patch knows.
        columns: The columns that are left, and what layers are given.
        visual: The visual columns, or None where nothing is to be cut.
        inputs: Keyword arguments of the composite's call and of its encoders.
        real_past: `[B, past]` bool or None: columns in the cache that are not padding.
        embeds: `[B, T, D]` embeddings that the decoder was given, or None.
        memo: Decisions of an earlier call without a cache that this one continues.
        deepstack: DeepStack features, where the decoder has them.
        recorded: Records of the method's taps.
        selection_time: Host seconds spent at the cuts.
        snapshots: Inputs of the layers that the method asked to read, by layer.
        decisions: What was decided at each stage so far.
        stages: For each stage so far, its layer and the surviving columns of every sample.
        required: `[M]` bool, visual tokens that the caller reads and that stay for it; None for none.
        answer_starts: Of each row, the column at which an answer begins; None where nothing tells.
        differentiable: Whether hidden states that are returned may be asked for gradients.
        cuts: Layer of each cut -> the methods that cut there.
        live: `[M]` bool, the visual tokens that no cut has dropped so far; set where there are visual tokens.
    """

    spec: PruneSpec
    options: CallOptions
    caches: kv_cache.Caches
    columns: Columns
    visual: VisualTokens | None
    inputs: dict[str, Any]
    real_past: Tensor | None = None
    embeds: Tensor | None = None
    memo: list[Decision] | None = None
    deepstack: DeepStackFeatures | None = None
    recorded: dict[str, list] = field(default_factory=dict)
    selection_time: float = 0.0
    snapshots: dict[int, Snapshot] = field(default_factory=dict)
    decisions: list[Decision] = field(default_factory=list)
    stages: list[tuple[int, list[Tensor]]] = field(default_factory=list)
    required: Tensor | None = None
    answer_starts: list[int] | None = None
    differentiable: bool = False
    cuts: dict[int, list[MethodCall]] = field(default_factory=dict)
    live: Tensor = field(init=False)
