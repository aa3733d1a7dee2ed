# SPDX-License-Identifier: Apache-2.0
"""Inputs of a method: the visual tokens of the batch laid out flat, and a decoder layer's attention inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ..errors import MethodError
from .ragged import group_ids
from .transfer import to_device

if TYPE_CHECKING:
    from ..models.anatomy import Anatomy


@dataclass
class AttentionInputs:
    """Queries, keys and values of one decoder layer, flat over the samples that have visual tokens.

    Attributes:
        queries: `[R, H, dh]` requested queries (text after the last visual token, or the last token), after norms and,
            with `rope=True`, rotation; like keys and values in the dtype of the model.
        query_offsets: `[S + 1]` int64 offsets of each sample's queries.
        query_order: `[R]` int64 index of each query among its sample's keys: it attends to keys `0..query_order`.
        keys: `[C, G, dh]` keys of all tokens (text and visual, no padding), not repeated for grouped heads.
        values: `[C, G, dv]`.
        key_offsets: `[S + 1]` int64 offsets of each sample's keys.
        visual: `[M]` int64 rows of `keys` that belong to the visual tokens, in the order of `Tokens`.
        scaling: Factor on the dot product.
        softcap: Tanh cap on the logits, or None.
    """

    queries: Tensor
    query_offsets: Tensor
    query_order: Tensor
    keys: Tensor
    values: Tensor
    key_offsets: Tensor
    visual: Tensor
    scaling: float
    softcap: float | None = None


@dataclass
class Prompt:
    """Positions of all tokens, text and visual, of the samples that have visual tokens; padding is left out.

    Without the cache of an earlier call, the rows are those of `AttentionInputs.keys`. They index what a tap without
    `columns` recorded since the last cut, for text as well: `record[prompt.batch, prompt.slot]` is `[C, ...]`. All
    tensors are int64.

    Attributes:
        batch, slot: `[C]` index of each token in the `[B, T, ...]` tensors of the current stage.
        offsets: `[S + 1]` offsets of each sample's tokens.
        visual: `[M]` rows of the visual tokens, in the order of `Tokens`.
        text: `[R]` rows of the text after the last visual token of each sample; its last token where there is none.
        text_offsets: `[S + 1]` offsets of each sample's rows in `text`.
    """

    batch: Tensor
    slot: Tensor
    offsets: Tensor
    visual: Tensor
    text: Tensor
    text_offsets: Tensor

    def to(self, device: torch.device) -> Prompt:
        """Copy on another device."""
        return Prompt(**{name: to_device(value, device) for name, value in vars(self).items()})


@dataclass
class Tokens:
    """The visual tokens left at one stage of a prefill, flat over the batch.

    They are ordered by sample, then by prompt position. `M` is their number, `S` the number of groups with a budget.
    Tensors are int64 on the device of `hidden`, unless stated otherwise.

    Attributes:
        hidden: `[M, D]` states entering the stage's layer, in the dtype of the model (for layer 0 the projected
            features in the prompt). With hyper-connections it is the mean over their streams.
        offsets: `[S + 1]` offsets of the groups.
        budgets: `[S]` number of tokens to keep in each group, at most its length.
        max_budget: The largest budget, known on the host; None if it has to be read from `budgets`.
        max_length: Length of the longest group, likewise.
        originals: `[S]` how many visual tokens each group had before the first cut.
        sample, image, frame, grid_row, grid_col: `[M]` origin of each token. `image` counts within the batch;
            `grid_row` and `grid_col` count in the grid of the image or crop (`crop`), -1 for tokens without a place
            (newlines, separators).
        crop: `[M]` 0 for a thumbnail or an undivided image, 1.. for the tile grid of any-resolution layouts.
        index: `[M]` index among the sample's original visual tokens, without those that another method prunes.
        feature: `[M]` row of the encoder's output (all images, then all videos) that each token comes from; it indexes
            the records of taps on the vision side. Beams of one sample share rows.
        position: `[M]` prompt position in the current call.
        layer: The cut is before this decoder layer.
        stage: Number of the stage, 0-based.
        num_layers: Decoder layers of the model.
        recorded: Records of the method's taps, a list per name in the order in which they were made; those of column
            taps are `[M, ...]`.
        inputs: Keyword arguments of the model call that describe the images (`image_sizes`, `image_grid_thw`,
            `pixel_values` ...), untouched.
        anatomy: The parts of the model, for methods that call one, such as the projector.
        memory: State that a method carries from stage to stage; a new dictionary for every prefill.
        prompt: Positions of text and visual tokens in the decoder's tensors, for methods that read taps on text.
        correct_attention: Set by a wrapper: maps the attention `[M]` of the vision tower before its host ranks by it.
    """

    hidden: Tensor
    offsets: Tensor
    budgets: Tensor
    originals: Tensor
    sample: Tensor
    image: Tensor
    frame: Tensor
    crop: Tensor
    grid_row: Tensor
    grid_col: Tensor
    index: Tensor
    feature: Tensor
    position: Tensor
    layer: int
    stage: int
    num_layers: int
    recorded: dict[str, list] = field(default_factory=dict)
    inputs: dict[str, Any] = field(default_factory=dict)
    anatomy: Anatomy | None = None
    memory: dict[str, Any] = field(default_factory=dict)
    prompt: Prompt | None = None
    reader: Callable[..., AttentionInputs] | None = None
    max_budget: int | None = None
    max_length: int | None = None
    correct_attention: Callable[[Tensor], Tensor] | None = None

    def __len__(self) -> int:
        return self.hidden.shape[0]

    @property
    def group(self) -> Tensor:
        """Number `[M]` of the group that each token belongs to."""
        return group_ids(self.offsets, len(self))

    @property
    def placed_hidden(self) -> Tensor:
        """States `[M, D]`, zero for tokens without a place in an image (newlines), unless no token has one."""
        placed = self.grid_row >= 0
        return torch.where((placed | ~placed.any())[:, None], self.hidden, 0)

    def attention_inputs(
        self, layer: int | None = None, rope: bool = True, queries: Literal["text", "last"] = "text"
    ) -> AttentionInputs:
        """Reads q, k, v of a decoder layer without running its attention.

        Args:
            layer: Decoder layer, by default the one after the cut. Any other has to be listed in the method's
                `required_layer_inputs`, so that the engine keeps its input.
            rope: False for keys and queries before rotation.
            queries: All text after the last visual token of the sample, or only the last token. Without text after the
                image both are the last token.

        Returns:
            AttentionInputs: In the model's dtype.

        Raises:
            MethodError: The layer has no attention, its input was not kept, or what it computes cannot be read.
        """
        if self.reader is None:
            raise MethodError(
                "Tokens.attention_inputs was called on tokens without a decoder; expected tokens handed out by a "
                "patched model"
            )
        return self.reader(self, self.layer if layer is None else layer, rope, queries)
