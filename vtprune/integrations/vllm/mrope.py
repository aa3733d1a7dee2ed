# SPDX-License-Identifier: Apache-2.0
"""M-RoPE: text after a pruned image stands where it stood, though the prompt is shorter.

vLLM asks for the positions of a whole prompt before its images are encoded, and its interface for pruned media puts in
those of the kept tokens afterwards. What is answered here first are the positions of the unpruned prompt without the
columns that are gone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .settings import Settings


class Positions:
    """Stands in front of a model's `get_mrope_input_positions`."""

    def __init__(self, original: Callable[..., tuple[Tensor, int]], settings: Settings) -> None:
        self.original, self.settings = original, settings

    def __call__(self, input_tokens: Sequence[int], mm_features: Sequence[Any]) -> tuple[Tensor, int]:
        """`[3, T]` positions of a prompt with pruned images, and what decoding adds to its length."""
        from .prompts import RUNS

        tokens, features, stays = list(input_tokens), [], torch.ones(len(input_tokens), dtype=torch.bool)
        grown = 0
        for feature in sorted(mm_features, key=lambda f: f.mm_position.offset):
            place = feature.mm_position
            start = place.offset + grown
            runs = None if feature.data is None or RUNS not in feature.data else feature.data[RUNS].data.tolist()
            length = place.length
            if runs is not None:
                piece, kept = self._grow(tokens[start : start + length], place.is_embed, runs)
                tokens[start : start + length] = piece
                stays = torch.cat([stays[:start], kept, stays[start + length :]])
                grown, length = grown + len(piece) - length, len(piece)
            features.append(
                dataclasses.replace(
                    feature, mm_position=dataclasses.replace(place, offset=start, length=length, is_embed=None)
                )
            )
        positions, _ = self.original(tokens, features)
        left = torch.as_tensor(positions)[..., stays]
        return left, int(positions.max()) + 1 - len(input_tokens)

    def _grow(self, piece: list[int], mask: Tensor | None, runs: Sequence[int]) -> tuple[list[int], Tensor]:
        """The piece of the prompt as it was before pruning, and which of its columns are left."""
        embeds = [True] * len(piece) if mask is None else mask.tolist()
        counts = iter(zip(self.settings.counts(runs), runs, strict=True))
        out: list[int] = []
        kept: list[bool] = []
        at = 0
        while at < len(piece):
            if not embeds[at]:
                out.append(piece[at])
                kept.append(True)
                at += 1
                continue
            count, size = next((c for c in counts if c[0]), (0, 0))  # pools that keep nothing left no placeholder
            out += [piece[at]] * size
            kept += [number < count for number in range(size)]
            at += max(count, 1)
        return out, torch.tensor(kept, dtype=torch.bool)
