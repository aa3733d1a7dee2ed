# SPDX-License-Identifier: Apache-2.0
"""The account of one prefill: what was kept and what it saved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .flops import DecoderShape, decoder_flops, kv_bytes
from .pictures_source import Source
from .visual_tokens import VisualTokens

if TYPE_CHECKING:
    from .explain import Why
    from .pictures import Pictures


@dataclass
class Pruning:
    """What the most recent prefill dropped.

    Attributes:
        visual: For each sample a LongTensor with the prompt columns that were visual. With a kept cache, columns count
            from the start of the conversation.
        kept: For each sample those that survived to the end.
        stages: `(layer, kept columns per sample)` for every cut; layer 0 is before the decoder.
        seconds: Host time spent deciding and compacting.
        method, budget: Names of what was asked.
        columns: Columns of the conversation after the prefill.
        slots: For each layer, the columns it ran on in this prefill; without an earlier cut of the same cache this is
            the length of the layer's keys and values.
        held_before: Columns of the conversation before this prefill.
        shape: Sizes of the decoder.
        places: Where each visual token lies in its picture.
        scores: For each stage the method's scores of the tokens that were alive, or None.
        kept_flat: For each stage the numbers of the surviving tokens in `places`.
        source: How the pictures came to the model.
        states: For each stage the states `[alive, D]` that the method saw, float32; None unless the call ran inside
            `vtprune.explain.recording()`.
    """

    visual: list[Tensor]
    kept: list[Tensor]
    stages: list[tuple[int, list[Tensor]]]
    seconds: float
    method: str
    budget: str
    columns: int
    slots: list[int]
    held_before: int
    shape: DecoderShape
    places: VisualTokens = field(repr=False)
    scores: list[Tensor | None] = field(default_factory=list, repr=False)
    kept_flat: list[Tensor] = field(default_factory=list, repr=False)
    source: Source = field(default_factory=Source, repr=False)
    states: list[Tensor | None] = field(default_factory=list, repr=False)
    _shown: Pictures | None = field(default=None, init=False, repr=False, compare=False)

    def per_layer(self, sample: int) -> list[int]:
        """Visual tokens of one sample at the input of every layer."""
        counts, left = [], len(self.visual[sample])
        cuts = {layer: len(kept[sample]) for layer, kept in self.stages}
        for layer in range(self.shape.layers):
            left = cuts.get(layer, left)
            counts.append(left)
        return counts

    @property
    def tokens(self) -> tuple[int, int]:
        """Visual tokens of the batch before, and after the last cut."""
        return sum(map(len, self.visual)), sum(map(len, self.kept))

    @property
    def mean_ratio(self) -> float:
        """Mean over the inputs of the decoder layers of the share of visual tokens that is left."""
        before = self.tokens[0]
        inputs = sum(sum(self.per_layer(s)) for s in range(len(self.visual)))
        return inputs / (self.shape.layers * before) if before else 1.0

    @property
    def flops(self) -> tuple[float, float]:
        """Multiply-adds of the visual tokens in the decoder before and after, counted as the papers do."""
        samples = range(len(self.visual))
        full = sum(decoder_flops([len(self.visual[s])] * self.shape.layers, self.shape) for s in samples)
        return full, sum(decoder_flops(self.per_layer(s), self.shape) for s in samples)

    @property
    def kv_bytes(self) -> tuple[int, int]:
        """Bytes of keys and values of this prefill's columns, before and after."""
        batch, length = len(self.visual), self.columns - self.held_before
        return kv_bytes([length] * self.shape.layers, batch, self.shape), kv_bytes(self.slots, batch, self.shape)

    def to_dict(self) -> dict:
        """The numbers of the report, for logs."""
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
            "seconds": self.seconds,
        }

    def report(self) -> str:
        """A few lines of text: tokens, mean ratio, FLOPs and KV bytes before and after."""
        (before, after), (flops, flops_after), (kv, kv_after) = self.tokens, self.flops, self.kv_bytes
        cuts = ", ".join(f"{sum(map(len, kept))} before layer {layer}" for layer, kept in self.stages) or "no cut"
        rows = [
            ("method", f"{self.method} ({self.budget})"),
            ("visual tokens", f"{before} -> {after} ({_percent(after, before)}): {cuts}"),
            ("mean ratio", f"{self.mean_ratio:.3f} over the inputs of {self.shape.layers} layers"),
            ("visual FLOPs", f"{_count(flops)} -> {_count(flops_after)} ({_percent(flops_after, flops)})"),
            ("KV cache", f"{_bytes(kv)} -> {_bytes(kv_after)} ({_percent(kv_after, kv)})"),
            ("deciding", f"{self.seconds * 1e3:.2f} ms"),
        ]
        return "\n".join(f"{name:<14} {text}" for name, text in rows)

    def __str__(self) -> str:
        return self.report()

    # --- tokens and pictures ------------------------------------------------------------------------------------------

    def alive(self, stage: int) -> Tensor:
        """Numbers in `places` of the tokens that were alive before a stage."""
        return self.kept_flat[stage - 1] if stage else torch.arange(len(self.places))

    def why(self, token: int) -> Why:
        """Score, rank and nearest kept token of one visual token, see `vtprune.explain.Why`."""
        from . import explain

        return explain.why(self, token)

    def show(
        self,
        images: Any = None,
        videos: Sequence[Any] | None = None,
        *,
        stages: bool = False,
        fit: str | None = None,
        names: Sequence[str] | None = None,
    ) -> Pictures:
        """The original pictures with dropped patches dark and grey; with several cuts, what went first is darkest.

        Notebooks display what this returns; elsewhere `save` it. Call it right after the prefill: where a model saw
        square crops, what was cut off or padded is found by comparing with the pixels that it was given.

        Args:
            images: The pictures of the call in the order of the batch: one or several of PIL pictures, arrays
                (`[H, W, 3]` or `[3, H, W]`, bytes, or floats from 0 to 1) or paths. None for those that were shown
                before, or for grey stand-ins.
            videos: For each clip the frames that the model was given.
            stages: One row per cut instead of one picture for all.
            fit: "stretch", "crop" or "pad", where it cannot be found out how a square crop was made.
            names: A caption for each picture.

        Raises:
            PictureError: These are not the pictures of this call, or the places of its tokens are not known.
        """
        from .pictures import Pictures

        if self._shown is None or images is not None or videos is not None:
            self._shown = Pictures.of(self, images, videos, fit=fit, names=names)
        return self._shown.by_stage() if stages else self._shown

    def save(self, path: Any, images: Any = None, videos: Sequence[Any] | None = None, **options: Any) -> None:
        """Writes what `show` shows to a picture file; see there."""
        self.show(images, videos, **options).save(path)

    def heatmap(
        self, images: Any = None, videos: Sequence[Any] | None = None, *, stage: int | None = None, **options: Any
    ) -> Pictures:
        """The pictures under the method's scores, from dark blue (lowest) to yellow, by rank among its sample's tokens.

        Args:
            images, videos, options: As for `show`.
            stage: Number of the cut, by default the first that has scores.

        Raises:
            PictureError: As `show`; or the method chooses without scores.
        """
        return self.show(images, videos, **options).heatmap(stage)

    def _repr_html_(self) -> str:
        """The report, and the pictures if they were shown before."""
        html = f"<pre>{escape(self.report())}</pre>"
        return html if self._shown is None else html + self._shown._repr_html_()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_shown": None}


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def _count(number: float) -> str:
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g}"


def _bytes(number: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number:.0f} B"
