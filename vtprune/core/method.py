# SPDX-License-Identifier: Apache-2.0
"""The contract of a pruning method: where it cuts, what it reads, and how it selects tokens.

A method knows no model class. It gets `Tokens`, the visual tokens of the whole batch laid out flat, and returns a
`Choice`. Padding, budgets, compaction, positions and the cache are handled by the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..errors import MethodError
from .options import check_options
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
        share: Published share of the original visual tokens that is left after the cut, in (0, 1). The shares of a
            schedule are rescaled to the user's budget, see `budget.stretch`.
    """

    layer: int
    share: float = 0.1


@dataclass(frozen=True)
class Tap:
    """A forward hook that records something for a method while the model runs, without changing its output.

    Attributes:
        name: Key of the records in `Tokens.recorded`.
        module: The module whose calls are recorded.
        record: Called after every forward of `module` inside a prefill with visual tokens, as
            `record(args, kwargs, output)`, under `torch.no_grad()`; its result is kept unless it is None.
        columns: The record is a tensor `[B, T, ...]` over the current prompt positions of the decoder: the engine cuts
            it together with the prompt, and passes it to the method flat over the visual tokens, `[M, ...]`.
        watched: The module attends, and `record` takes what it passed to its attention function as a fourth argument:
            a `vtprune.models.attention_probe.Watch`, or None if that could not be seen.
    """

    name: str
    module: nn.Module
    record: Callable[..., Any]
    columns: bool = False
    watched: bool = False


@dataclass
class Choice:
    """The tokens that a method keeps at one stage.

    Attributes:
        keep: `[M]` bool, True for tokens that stay.
        hidden: `[M, D]` float or None. New states for the kept tokens, for methods that merge dropped tokens into kept
            ones; rows of dropped tokens are ignored.
        scores: `[M]` real or None. Scores that the method ranked by, for reports and overlays.
    """

    keep: Tensor
    hidden: Tensor | None = None
    scores: Tensor | None = None


class Method:
    """Base of all methods. Subclasses are dataclasses; their fields are the method's options.

    Class attributes:
        name: The name it is registered under.
        group: Whether a budget applies to the whole sample or to each image of it.
        needs_frames: The method compares the frames of clips and refuses still pictures.
        question_aware: With its default options, what the method keeps depends on the prompt's text.
        differentiable: In training, `choose` runs with gradients, so that merged states pass them on.

    A field `positions`, "original" (as without it) or "compact", says whether kept tokens keep their positions or are
    numbered through.
    """

    name: ClassVar[str] = ""
    group: ClassVar[Group] = "sample"
    needs_frames: ClassVar[bool] = False
    question_aware: ClassVar[bool] = False
    differentiable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Checks the options; a subclass with more to check calls it first."""
        check_options(self)

    def schedule(self, num_layers: int) -> Sequence[Stage]:
        """Cuts of the method in a decoder of `num_layers` layers, in ascending order of layers.

        By default one cut, before the layer in the option `layer`, or before the decoder if there is no such option.
        """
        return (Stage(getattr(self, "layer", 0)),)

    def required_layer_inputs(self, num_layers: int) -> Iterable[int]:
        """Decoder layers before the cut that the method passes to `Tokens.attention_inputs(layer=...)`."""
        return ()

    def taps(self, anatomy: Anatomy) -> Iterable[Tap]:
        """Records to make while the model runs.

        Raises:
            MethodError: The model lacks what the method needs.
        """
        return ()

    def choose(self, tokens: Tokens) -> Choice:
        """Selects the tokens that stay.

        Args:
            tokens: The visual tokens of the whole batch; its tensors must not be changed in place.

        Returns:
            Choice: With exactly `tokens.budgets[s]` tokens of each group `s`.
        """
        raise MethodError(
            f"{type(self).__name__} defines no choose; derive it from ScoreMethod and define score, or define choose"
        )


def name_of(method: Method) -> str:
    """The name that a method's class is registered under, or the class's own."""
    return vars(type(method)).get("name") or type(method).__name__


def check_choice(choice: Choice, tokens: Tokens, name: str) -> None:
    """Raises `MethodError` unless what `choose` returned has the types and shapes of a `Choice` for `tokens`."""
    count = len(tokens)
    if not isinstance(choice, Choice):
        raise MethodError(f"{name}.choose returned a {type(choice).__name__}; expected a vtprune.methods.Choice")
    for field, shape in (("keep", (count,)), ("scores", (count,)), ("hidden", tuple(tokens.hidden.shape))):
        value = getattr(choice, field)
        if value is None and field != "keep":
            continue
        if not isinstance(value, Tensor) or value.is_meta or value.shape != shape:
            found = (
                f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            )
            raise MethodError(f"{name}.choose returned {found} as `{field}`; expected a tensor of shape {shape}")
    if choice.keep.dtype != torch.bool:
        raise MethodError(
            f"{name}.choose returned {choice.keep.dtype} as `keep`; expected torch.bool, True for tokens that stay (of "
            "row numbers: torch.zeros(len(tokens), dtype=torch.bool).index_fill_(0, rows, True))"
        )


class ScoreMethod(Method):
    """A method that scores every token; the largest scores of each group stay, ties go to the smaller position."""

    def score(self, tokens: Tokens) -> Tensor:
        """Scores of the tokens; the largest of each group stay.

        Args:
            tokens: The visual tokens of the whole batch; its tensors must not be changed in place.

        Returns:
            Tensor: `[M]` of any real dtype, without NaN.
        """
        raise MethodError(f"{type(self).__name__} defines neither score nor choose; a method needs one of them")

    def select(self, tokens: Tokens, scores: Tensor) -> Choice:
        """Turns scores `[M]`, which a wrapper may have changed, into a choice."""
        return Choice(top_k(scores, tokens.offsets, tokens.budgets), scores=scores)

    def choose(self, tokens: Tokens) -> Choice:
        scores = self.score(tokens)
        check_scores(scores, (len(tokens),), f"{type(self).__name__}.score")
        return self.select(tokens, scores)


def check_scores(scores: Tensor, shape: tuple[int, ...], source: str) -> None:
    """Raises `MethodError` unless scores are one real number per row."""
    if not isinstance(scores, Tensor) or scores.is_meta or scores.is_complex():
        found = f"{scores.dtype} on {scores.device}" if isinstance(scores, Tensor) else f"a {type(scores).__name__}"
        raise MethodError(f"{source} returned {found}; expected a tensor of real numbers")
    if scores.shape != shape:
        raise MethodError(
            f"{source} returned shape {tuple(scores.shape)}; expected {shape}, one number per visual token"
        )
