# SPDX-License-Identifier: Apache-2.0
"""What a method is handed: the visual tokens of the batch laid out flat, and a decoder layer's attention inputs."""

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
    """What one decoder layer feeds its attention function, flat over the samples that have visual tokens.

    Attributes:
        queries: `[R, H, dh]` rows asked for (text after the last visual token, or the last token), after norms and,
            with `rope=True`, rotation.
        query_offsets: `[S + 1]` offsets of each sample's rows.
        query_order: `[R]` place of each row in its sample's list of keys: it may see keys `0..query_order`.
        keys: `[C, G, dh]` keys of all real columns (text and visual, no padding), not repeated for grouped heads.
        values: `[C, G, dv]`.
        key_offsets: `[S + 1]` offsets of each sample's keys.
        visual: `[M]` rows of `keys` that belong to the visual tokens, in the order of `Tokens`.
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
    """All columns that hold a token, text or visual, of the samples that have visual tokens; padding is left out.

    Without an earlier call's cache the rows are those of `AttentionInputs.keys`. With them a method can look up what a
    tap without `columns` recorded since the last cut, for text as well: `record[prompt.batch, prompt.slot]` is
    `[C, ...]`.

    Attributes:
        batch, slot: `[C]` where each token is in the `[B, T, ...]` tensors of the present stage.
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
        """The same on another device."""
        return Prompt(**{name: to_device(value, device) for name, value in vars(self).items()})


@dataclass
class Tokens:
    """The visual tokens that are alive at one stage of one prefill, flat over the batch.

    Order: by sample, then by prompt column. `M` is their number, `S` the number of groups that a budget applies to.

    Attributes:
        hidden: `[M, D]` states entering the stage's layer (for layer 0 the projected features in the prompt).
        offsets: `[S + 1]` offsets of the groups.
        budgets: `[S]` how many tokens of each group must be left, never more than its length.
        max_budget: The largest of them, known without waiting for a device; None where it has to be read.
        max_length: Tokens of the longest group, likewise.
        originals: `[S]` how many visual tokens each group had before the first cut.
        sample, image, frame, grid_row, grid_col: `[M]` where each token comes from. `image` counts within the batch;
            `grid_row` and `grid_col` count in the grid of the image or crop (`crop`), -1 for tokens without a place
            (newlines, separators).
        crop: `[M]` 0 for a thumbnail or an undivided image, 1.. for the tile grid of any-resolution layouts.
        index: `[M]` running number among the original visual tokens of the sample.
        feature: `[M]` row of the encoder's output (all images, then all videos) that fills the column: what taps on the
            vision side record per feature is looked up with it. Beams of one sample share rows.
        position: `[M]` prompt column of the present call.
        layer: The cut is before this decoder layer.
        stage: Number of the stage, 0-based.
        num_layers: Decoder layers of the model.
        recorded: Records of the method's taps: a list per name, or `[M, ...]` stacked as a list for column taps.
        inputs: Keyword arguments of the model call that describe the images (`image_sizes`, `image_grid_thw`,
            `pixel_values` ...), untouched.
        anatomy: The parts of the model, for methods that call one (the projector, say).
        memory: A dictionary that lives for this prefill only: what a method wants to carry from stage to stage.
        prompt: Where text and visual tokens are in the decoder's tensors, for methods that read taps on text.
        correct_attention: Set by a wrapper: changes the attention `[M]` of the vision tower that its host ranks by.
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
        """`[M]` number of the group that each token belongs to."""
        return group_ids(self.offsets, len(self))

    @property
    def placed_hidden(self) -> Tensor:
        """`[M, D]` states, zeros for tokens that have no place in a picture (newlines) where others have one."""
        placed = self.grid_row >= 0
        return torch.where((placed | ~placed.any())[:, None], self.hidden, 0)

    def attention_inputs(
        self, layer: int | None = None, rope: bool = True, queries: Literal["text", "last"] = "text"
    ) -> AttentionInputs:
        """Reads q, k, v of a decoder layer without running its attention.

        Args:
            layer: Decoder layer, by default the one the cut stands before. Another one has to be named in the method's
                `required_layer_inputs`, so that the engine keeps its input.
            rope: False for keys and queries before rotation.
            queries: Which rows: all text after the last visual token of the sample, or only the last token. Without
                text after the image both are the last token.

        Returns:
            AttentionInputs: In the model's dtype.
        """
        if self.reader is None:
            raise MethodError("these tokens come without a decoder: there is nothing to read queries and keys from")
        return self.reader(self, self.layer if layer is None else layer, rope, queries)
