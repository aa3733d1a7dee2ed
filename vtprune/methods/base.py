# SPDX-License-Identifier: Apache-2.0
"""What a pruning method is: where it cuts, what it reads, and how it chooses.

A method never sees a model. It gets `Tokens`, the visual tokens of the whole batch laid out flat, and answers with a
`Choice`. Padding, budgets, ties, compaction, positions and the cache belong to the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..errors import MethodError
from ..selection import segment_ids, top_k
from ..sending import send

if TYPE_CHECKING:
    from ..anatomy import Anatomy

Pool = Literal["sample", "image"]


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
        name: Key under which the records appear in `Tokens.observed`.
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
class AttentionInputs:
    """What one decoder layer feeds its attention function, flat over the samples that have visual tokens.

    Attributes:
        queries: `[R, H, dh]` rows asked for (text after the last visual token, or the last token), after norms and,
            with `rope=True`, rotation.
        query_segments: `[S + 1]` offsets of each sample's rows.
        query_order: `[R]` place of each row in its sample's list of keys: it may see keys `0..query_order`.
        keys: `[C, G, dh]` keys of all real columns (text and visual, no padding), not repeated for grouped heads.
        values: `[C, G, dv]`.
        key_segments: `[S + 1]` offsets of each sample's keys.
        visual: `[M]` rows of `keys` that belong to the visual tokens, in the order of `Tokens`.
        scaling: Factor on the dot product.
        softcap: Tanh cap on the logits, or None.
    """

    queries: Tensor
    query_segments: Tensor
    query_order: Tensor
    keys: Tensor
    values: Tensor
    key_segments: Tensor
    visual: Tensor
    scaling: float
    softcap: float | None = None


@dataclass
class Prompt:
    """All columns that hold a token, text or visual, of the samples that have visual tokens; padding is left out.

    Without an earlier call's cache the rows are those of `AttentionInputs.keys`. With them a method can look up what a
    tap without `columns` recorded since the last cut, for text as well: `record[prompt.batch, prompt.column]` is
    `[C, ...]`.

    Attributes:
        batch, column: `[C]` where each token is in the `[B, T, ...]` tensors of the present stage.
        segments: `[S + 1]` offsets of each sample's tokens.
        visual: `[M]` rows of the visual tokens, in the order of `Tokens`.
        text: `[R]` rows of the text after the last visual token of each sample; its last token where there is none.
        text_segments: `[S + 1]` offsets of each sample's rows in `text`.
    """

    batch: Tensor
    column: Tensor
    segments: Tensor
    visual: Tensor
    text: Tensor
    text_segments: Tensor

    def to(self, device: torch.device) -> Prompt:
        """The same on another device."""
        return Prompt(**{name: send(value, device) for name, value in vars(self).items()})


@dataclass
class Tokens:
    """The visual tokens that are alive at one stage of one prefill, flat over the batch.

    Order: by sample, then by prompt column. `M` is their number, `S` the number of pools that a budget applies to.

    Attributes:
        hidden: `[M, D]` states entering the stage's layer (for layer 0 the projected features in the prompt).
        segments: `[S + 1]` offsets of the pools.
        budgets: `[S]` how many tokens of each pool must be left, never more than its length.
        max_budget: The largest of them, known without waiting for a device; None where it has to be read.
        max_length: Tokens of the longest pool, likewise.
        originals: `[S]` how many visual tokens each pool had before the first cut.
        sample, image, frame, row, col: `[M]` where each token comes from. `image` counts within the batch; `row` and
            `col` count in the grid of the image or crop (`crop`), -1 for tokens without a place (newlines, separators).
        crop: `[M]` 0 for a thumbnail or an undivided image, 1.. for the tile grid of any-resolution layouts.
        index: `[M]` running number among the original visual tokens of the sample.
        feature: `[M]` row of the encoder's output (all images, then all videos) that fills the column: what taps on the
            vision side record per feature is looked up with it. Beams of one sample share rows.
        column: `[M]` prompt column of the present call.
        layer: The cut is before this decoder layer.
        stage: Number of the stage, 0-based.
        num_layers: Decoder layers of the model.
        observed: Records of the method's taps: a list per name, or `[M, ...]` stacked as a list for column taps.
        inputs: Keyword arguments of the model call that describe the images (`image_sizes`, `image_grid_thw`,
            `pixel_values` ...), untouched.
        anatomy: The parts of the model, for methods that call one (the projector, say).
        memory: A dictionary that lives for this prefill only: what a method wants to carry from stage to stage.
        prompt: Where text and visual tokens are in the decoder's tensors, for methods that read taps on text.
    """

    hidden: Tensor
    segments: Tensor
    budgets: Tensor
    originals: Tensor
    sample: Tensor
    image: Tensor
    frame: Tensor
    crop: Tensor
    row: Tensor
    col: Tensor
    index: Tensor
    feature: Tensor
    column: Tensor
    layer: int
    stage: int
    num_layers: int
    observed: dict[str, list] = field(default_factory=dict)
    inputs: dict[str, Any] = field(default_factory=dict)
    anatomy: Anatomy | None = None
    memory: dict[str, Any] = field(default_factory=dict)
    prompt: Prompt | None = None
    reader: Callable[..., AttentionInputs] | None = None
    max_budget: int | None = None
    max_length: int | None = None

    def __len__(self) -> int:
        return self.hidden.shape[0]

    @property
    def pool(self) -> Tensor:
        """`[M]` number of the pool that each token belongs to."""
        return segment_ids(self.segments, len(self))

    def attention_inputs(
        self, layer: int | None = None, rope: bool = True, queries: Literal["text", "last"] = "text"
    ) -> AttentionInputs:
        """Reads q, k, v of a decoder layer without running its attention.

        Args:
            layer: Decoder layer, by default the one the cut stands before. Another one has to be named in the method's
                `reads`, so that the engine keeps its input.
            rope: False for keys and queries before rotation.
            queries: Which rows: all text after the last visual token of the sample, or only the last token. Without
                text after the image both are the last token.

        Returns:
            AttentionInputs: In the model's dtype.
        """
        if self.reader is None:
            raise MethodError("these tokens come without a decoder: there is nothing to read queries and keys from")
        return self.reader(self, self.layer if layer is None else layer, rope, queries)


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
        pool: What a budget applies to: the whole sample, or each image of it.
        reads: Decoder layers, relative to the model, whose input the method wants to probe besides the stage's own.
    """

    name: ClassVar[str] = ""
    pool: ClassVar[Pool] = "sample"

    def schedule(self, num_layers: int) -> Sequence[Stage]:
        """Where the method cuts in a decoder of `num_layers` layers, in ascending order of layers."""
        return (Stage(getattr(self, "layer", 0)),)

    def reads(self, num_layers: int) -> Iterable[int]:
        """Decoder layers before the cut whose inputs `attention_inputs(layer=...)` will be asked for."""
        return ()

    def taps(self, anatomy: Anatomy) -> Iterable[Tap]:
        """What to record while the model runs. Raises `MethodError` where the model lacks what the method needs."""
        return ()

    def choose(self, tokens: Tokens) -> Choice:
        """Chooses the tokens that stay: exactly `tokens.budgets[s]` of each pool."""
        raise NotImplementedError


class ScoreMethod(Method):
    """A method that gives every token a number; in each pool the largest numbers stay, ties to the smaller column."""

    def score(self, tokens: Tokens) -> Tensor:
        """Returns `[M]`: higher stays."""
        raise NotImplementedError

    def select(self, tokens: Tokens, scores: Tensor) -> Choice:
        """Turns scores into a choice; a wrapper may hand in scores that it changed."""
        return Choice(top_k(scores, tokens.segments, tokens.budgets), scores=scores)

    def choose(self, tokens: Tokens) -> Choice:
        scores = self.score(tokens)
        if scores.shape != (len(tokens),):
            raise MethodError(
                f"{type(self).__name__}.score returned shape {tuple(scores.shape)}; expected ({len(tokens)},), "
                "one number per visual token"
            )
        return self.select(tokens, scores)
