# SPDX-License-Identifier: Apache-2.0
"""What a pruning method is: where it cuts, what it reads, and how it chooses.

A method never sees a model. It gets `Tokens`, the visual tokens of the whole batch laid out flat, and answers with a
`Choice`. Padding, budgets, ties, compaction, positions and the cache belong to the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor, nn

from ..errors import MethodError
from .ragged import top_k

if TYPE_CHECKING:
    from ..models.anatomy import Anatomy
from .tokens import Tokens

Group = Literal["sample", "image"]


@dataclass(frozen=True)
class Stage:
    """One cut of a method's published schedule.

    Attributes:
        layer: The cut happens before this decoder layer runs (0-based); 0 is before the decoder.
        share: Published share of the ORIGINAL visual tokens that is left after the cut, in (0, 1]. Only the ratios
            between the shares of a schedule matter: the user's budget stretches them.
    """

    layer: int
    share: float = 0.1


@dataclass(frozen=True)
class Tap:
    """Something a method wants to read while the model runs, without changing it.

    Attributes:
        name: Key under which the records appear in `Tokens.recorded`.
        module: The module whose calls are recorded.
        record: Called after every forward of `module` inside a prefill with visual tokens, as
            `record(args, kwargs, output)`, under `torch.no_grad()`; what it returns is kept (None is not).
        columns: The record is a tensor `[B, T, ...]` over the current prompt columns of the decoder: the engine cuts it
            whenever it cuts the columns, and hands it out flat over the visual tokens, `[M, ...]`.
    """

    name: str
    module: nn.Module
    record: Callable[[tuple, dict, Any], Any]
    columns: bool = False


@dataclass
class Choice:
    """A method's answer at one stage.

    Attributes:
        keep: `[M]` bool. True stays.
        hidden: `[M, D]` or None. New states for the kept tokens, for methods that merge dropped tokens into kept ones;
            rows of dropped tokens are ignored.
        scores: `[M]` or None. What the method ranked by, for reports and pictures.
    """

    keep: Tensor
    hidden: Tensor | None = None
    scores: Tensor | None = None


class Method:
    """Base of all methods. Subclasses are dataclasses; their fields are the method's options.

    Class attributes:
        group: What a budget applies to: the whole sample, or each image of it.
        needs_frames: The method compares the frames of clips and has no rule for pictures, which it refuses.
        required_layer_inputs: Decoder layers, relative to the model, whose input the method
            wants to probe besides the stage's own.
    """

    name: ClassVar[str] = ""
    group: ClassVar[Group] = "sample"
    needs_frames: ClassVar[bool] = False

    def schedule(self, num_layers: int) -> Sequence[Stage]:
        """Where the method cuts in a decoder of `num_layers` layers, in ascending order of layers."""
        return (Stage(getattr(self, "layer", 0)),)

    def required_layer_inputs(self, num_layers: int) -> Iterable[int]:
        """Decoder layers before the cut whose inputs `attention_inputs(layer=...)` will be asked for."""
        return ()

    def taps(self, anatomy: Anatomy) -> Iterable[Tap]:
        """What to record while the model runs. Raises `MethodError` where the model lacks what the method needs."""
        return ()

    def choose(self, tokens: Tokens) -> Choice:
        """Chooses the tokens that stay: exactly `tokens.budgets[s]` of each group."""
        raise NotImplementedError


class ScoreMethod(Method):
    """A method that gives every token a number; in each group the largest numbers stay, ties to the smaller column."""

    def score(self, tokens: Tokens) -> Tensor:
        """Returns `[M]`: higher stays."""
        raise NotImplementedError

    def select(self, tokens: Tokens, scores: Tensor) -> Choice:
        """Turns scores into a choice; a wrapper may hand in scores that it changed."""
        return Choice(top_k(scores, tokens.offsets, tokens.budgets), scores=scores)

    def choose(self, tokens: Tokens) -> Choice:
        scores = self.score(tokens)
        if scores.shape != (len(tokens),):
            raise MethodError(
                f"{type(self).__name__}.score returned shape {tuple(scores.shape)}; expected ({len(tokens)},), "
                "one number per visual token"
            )
        return self.select(tokens, scores)
