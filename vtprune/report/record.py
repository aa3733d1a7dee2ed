# SPDX-License-Identifier: Apache-2.0
"""The record of one prefill, and the numbers derived from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ..core.ragged import scatter
from ..core.transfer import to_device
from ..errors import VTPruneError
from ..models.visual_tokens import VisualTokens
from .cost import DecoderShape, decoder_flops, kv_bytes
from .image_source import Source
from .tower import TowerPruning, TowerRun, Work


@dataclass
class PruningRecord:
    """Visual tokens of the most recent prefill: which were dropped at which layer, and what that saved.

    Attributes:
        visual: For each sample, a LongTensor with the positions of its visual tokens. With a kept cache, positions
            count from the start of the conversation.
        kept: For each sample, the positions of the tokens left after the last cut.
        stages: `(layer, kept positions per sample)` for every cut; layer 0 is before the decoder.
        selection_time: Host seconds spent selecting and cutting.
        method, budget: Name of the method and text of the budget.
        columns: Length of the conversation after the prefill.
        slots: For each layer, the number of positions it ran on in this prefill; without an earlier cut of the same
            cache this is the length of the layer's keys and values.
        cached_before: Length of the conversation before this prefill.
        shape: Sizes of the decoder.
        layout: `index`, `valid` and `real`: position in this call of each slot of the last layer `[B, K]`, whether the
            slot is used `[B, K]`, and which positions are not padding `[B, T]`.
        places: Place of each visual token in its image.
        scores: For each stage, the method's scores of the tokens left before it, or None.
        kept_flat: For each stage, the numbers in `places` of the tokens left after it.
        source: Origin of the call's images.
        states: For each stage, the states `[n, D]` of the tokens left before it, float32; None unless the call ran
            inside `vtprune.report.explain.recording()`.
        evicted: With `window=`, for each sample the positions of frames that left the cache after the prefill; else
            empty.
        work: Cost of a token in projector and decoder.
        text: Number of text tokens of each sample in this prefill.
        tower_runs: Calls of the vision tower that made the features.
    """

    visual: list[Tensor]
    kept: list[Tensor]
    stages: list[tuple[int, list[Tensor]]]
    selection_time: float
    method: str
    budget: str
    columns: int
    slots: list[int]
    cached_before: int
    shape: DecoderShape
    layout: tuple[Tensor, Tensor, Tensor] = field(repr=False)
    places: VisualTokens = field(repr=False)
    scores: list[Tensor | None] = field(default_factory=list, repr=False)
    kept_flat: list[Tensor] = field(default_factory=list, repr=False)
    source: Source = field(default_factory=Source, repr=False)
    states: list[Tensor | None] = field(default_factory=list, repr=False)
    evicted: list[Tensor] = field(default_factory=list, repr=False)
    work: Work | None = field(default=None, repr=False)
    text: list[int] = field(default_factory=list, repr=False)
    tower_runs: list[TowerRun] = field(default_factory=list, repr=False)

    @property
    def mask(self) -> Tensor:
        """Mask `[B, T]` bool on the CPU of the tokens of this call, text and visual, left after the last cut."""
        index, valid, real = self.layout
        return scatter(valid, index, valid, real.shape[1]) & real

    def scatter(self, x: Tensor) -> Tensor:
        """Scatters values of a layer after the last cut to the positions of the unpruned call.

        Args:
            x: `[B, K, ...]`, one row for each token that was kept, such as the states that a hook on a late layer gets.

        Returns:
            Tensor: `[B, T, ...]`, zero at dropped positions; differentiable in `x`.

        Raises:
            VTPruneError: `x` does not begin with shape `[B, K]`.
        """
        index, valid, real = self.layout
        if x.dim() < 2 or x.shape[:2] != index.shape:
            raise VTPruneError(
                f"x has shape {tuple(x.shape)}; expected {tuple(index.shape)} and more, one row per kept token"
            )
        return scatter(x, to_device(index, x.device), to_device(valid, x.device), real.shape[1])

    def per_layer(self, sample: int) -> list[int]:
        """Number of visual tokens of one sample at the input of every layer."""
        counts, left = [], len(self.visual[sample])
        cuts = {layer: len(kept[sample]) for layer, kept in self.stages}
        for layer in range(self.shape.layers):
            left = cuts.get(layer, left)
            counts.append(left)
        return counts

    @property
    def tokens(self) -> tuple[int, int]:
        """Number of visual tokens of the batch before the first cut and after the last."""
        return sum(map(len, self.visual)), sum(map(len, self.kept))

    @property
    def mean_ratio(self) -> float:
        """Share of visual tokens that is left, averaged over the inputs of the decoder layers."""
        before = self.tokens[0]
        inputs = sum(sum(self.per_layer(s)) for s in range(len(self.visual)))
        return inputs / (self.shape.layers * before) if before else 1.0

    @property
    def flops(self) -> tuple[float, float]:
        """Multiply-adds of the visual tokens in the decoder without and with pruning, counted as in the papers."""
        samples = range(len(self.visual))
        full = sum(decoder_flops([len(self.visual[s])] * self.shape.layers, self.shape) for s in samples)
        return full, sum(decoder_flops(self.per_layer(s), self.shape) for s in samples)

    @property
    def kv_bytes(self) -> tuple[int, int]:
        """Bytes of keys and values of this prefill's tokens, without and with pruning."""
        batch, length = len(self.visual), self.columns - self.cached_before
        return kv_bytes([length] * self.shape.layers, batch, self.shape), kv_bytes(self.slots, batch, self.shape)

    @cached_property
    def tower(self) -> TowerPruning | None:
        """Costs and kept patches of the vision tower; None if it did not run or is no list of blocks."""
        if self.work is None or not self.tower_runs:
            return None
        samples, layers = range(len(self.visual)), self.shape.layers
        projected = self.work.projector * self.tokens[0]
        whole = [self.work.decoder([self.text[s] + len(self.visual[s])] * layers) for s in samples]
        left = [self.work.decoder([self.text[s] + n for n in self.per_layer(s)]) for s in samples]
        return TowerPruning(self.tower_runs, (projected + sum(whole), projected + sum(left)))

    def to_dict(self) -> dict:
        """The numbers of the report as JSON values."""
        (before, after), (flops, flops_after), (kv, kv_after) = self.tokens, self.flops, self.kv_bytes
        return {
            "method": self.method,
            "budget": self.budget,
            "visual_tokens": before,
            "kept_tokens": after,
            "per_sample": [[len(v), len(k)] for v, k in zip(self.visual, self.kept, strict=True)],
            "stages": [[layer, [len(k) for k in kept]] for layer, kept in self.stages],
            "mean_ratio": self.mean_ratio,
            "flops": flops,
            "flops_after": flops_after,
            "kv_bytes": kv,
            "kv_bytes_after": kv_after,
            "selection_time": self.selection_time,
            "tower": None if self.tower is None else self.tower.to_dict(),
        }

    def alive(self, stage: int) -> Tensor:
        """Numbers in `places` of the tokens left before a stage."""
        return self.kept_flat[stage - 1] if stage else torch.arange(len(self.places))
