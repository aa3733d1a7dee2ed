# SPDX-License-Identifier: Apache-2.0
"""`patch.last`: the record of a prefill with its report, pictures and explanations of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from .explain import TokenExplanation, explain_token
from .overlay import Pictures
from .record import PruningRecord


@dataclass
class Pruning(PruningRecord):
    """`patch.last`, the record of the most recent prefill, with its report, pictures and explanations of tokens.

    Its data, such as `kept`, `stages`, `mask` and `tower`, are those of `vtprune.report.record.PruningRecord`.
    """

    _shown: Pictures | None = field(default=None, init=False, repr=False, compare=False)

    def report(self) -> str:
        """Summary as text: visual tokens, mean ratio, FLOPs and KV bytes without and with pruning."""
        (before, after), (flops, flops_after), (kv, kv_after) = self.tokens, self.flops, self.kv_bytes
        cuts = ", ".join(f"{sum(map(len, kept))} before layer {layer}" for layer, kept in self.stages) or "no cut"
        rows = [
            ("method", f"{self.method} ({self.budget})"),
            ("visual tokens", f"{before} -> {after} ({_percent(after, before)}): {cuts}"),
            ("mean ratio", f"{self.mean_ratio:.3f} over the inputs of {self.shape.layers} layers"),
            ("visual FLOPs", f"{_count(flops)} -> {_count(flops_after)} ({_percent(flops_after, flops)})"),
            ("KV cache", f"{_bytes(kv)} -> {_bytes(kv_after)} ({_percent(kv_after, kv)})"),
            ("selection", f"{self.selection_time * 1e3:.2f} ms"),
        ]
        return "\n".join(f"{name:<14} {text}" for name, text in rows + self._tower_rows())

    def _tower_rows(self) -> list[tuple[str, str]]:
        """Rows of the report about the vision tower and the cost of the first token."""
        if self.tower is None:
            return []
        (before, after), (share, share_after) = self.tower.flops, self.tower.share
        (whole, left), patches = self.tower.first_token, sum(self.tower.patches)
        ran = f"{sum(map(len, self.tower.kept))} of {patches} patches from block {self.tower_runs[0].block} on"
        cut = f"{_count(before)} -> {_count(after)} FLOPs ({_percent(after, before)}): {ran}"
        rows = [("vision tower", cut if patches else f"{_count(before)} FLOPs, not cut")]
        if patches:
            rows.append(("", f"selected in {self.tower.selection_time * 1e3:.2f} ms"))
        gain = f"{whole / left:.1f}x fewer FLOPs up to it, tower included" if left < whole else "nothing pruned"
        rows.append(("first token", f"{gain}; the tower's share {100 * share:.0f} % -> {100 * share_after:.0f} %"))
        rows.append(("", f"pruning the decoder alone can give at most {self.tower.bound:.1f}x"))
        return rows

    def __str__(self) -> str:
        return self.report()

    def __repr__(self) -> str:
        before, after = self.tokens
        return f"Pruning({self.method}, {self.budget}, {before} -> {after} visual tokens)"

    def explain_token(self, token: int) -> TokenExplanation:
        """Score, rank and nearest kept token of one visual token.

        Args:
            token: Its number among the visual tokens of the call.

        Returns:
            TokenExplanation: With the nearest token if the call ran inside `vtprune.report.explain.recording()`.

        Raises:
            VTPruneError: The call had no such token.
        """
        return explain_token(self, token)

    def show(
        self,
        images: Any = None,
        videos: Sequence[Any] | None = None,
        *,
        stages: bool = False,
        fit: str | None = None,
        names: Sequence[str] | None = None,
    ) -> Pictures:
        """The original pictures with dropped patches dark and gray; patches that were dropped earlier are darker.

        Clips get a strip above their frames: a bar for every frame, as high as the share of its tokens that stayed.
        Notebooks display the result; elsewhere `save` it. Call it right after the prefill: for models that take square
        crops, cropping and padding are found by comparing the pictures with the pixels that the model got.

        Args:
            images: The pictures of the call in the order of the batch: one or several PIL pictures, arrays (`[H, W, 3]`
                or `[3, H, W]`, bytes, or floats from 0 to 1) or paths. None for those that were shown before, or for
                gray placeholders.
            videos: For each clip, the frames that the model was given.
            stages: One row per cut instead of one picture for all.
            fit: "stretch", "crop" or "pad", if it cannot be determined how a square crop was made.
            names: A caption for each picture.

        Raises:
            PictureError: These are not the pictures of this call, or the places of its tokens are not known.
            InputError: A path is not that of a picture that can be read.
        """
        if self._shown is None or images is not None or videos is not None:
            self._shown = Pictures.of(self, images, videos, fit=fit, names=names)
        return self._shown.by_stage() if stages else self._shown

    def save(self, path: Any, images: Any = None, videos: Sequence[Any] | None = None, **options: Any) -> None:
        """Writes the result of `show` to a picture file; its suffix determines the format.

        Args:
            path: The file.
            images, videos, options: As for `show`.

        Raises:
            PictureError: As `show`; or the file cannot be written.
        """
        self.show(images, videos, **options).save(path)

    def heatmap(
        self, images: Any = None, videos: Sequence[Any] | None = None, *, stage: int | None = None, **options: Any
    ) -> Pictures:
        """The pictures under a heat map of the method's scores, from dark blue (lowest rank in its sample) to yellow.

        Args:
            images, videos, options: As for `show`.
            stage: Number of the cut, by default the first with scores.

        Raises:
            PictureError: As `show`; or the method has no scores.
        """
        return self.show(images, videos, **options).heatmap(stage)

    def _repr_html_(self) -> str:
        """HTML of the report, with the pictures if they were shown before."""
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
