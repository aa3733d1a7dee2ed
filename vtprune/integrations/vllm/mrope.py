# SPDX-License-Identifier: Apache-2.0
"""M-RoPE: text after a pruned image stands where it stood, though the prompt is shorter.

vLLM asks for the positions of a whole prompt before its images are encoded, and its interface for pruned media
(`SupportsMultiModalPruning`) puts in those of the kept tokens afterwards. What is answered first are the positions of
the unpruned prompt without the columns that are gone: those of text are right and stay. Afterwards only columns of
images are written, each relative to the text before it, so that chunks, a cached prefix or a request that starts over
change nothing. Features carry their positions in the model's own type: bfloat16 counts exactly to 256 rows or columns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .settings import Settings


class Positions:
    """Stands in front of a model's `get_mrope_input_positions` and `recompute_mrope_positions`.

    Args:
        model: A model with vLLM's interfaces for M-RoPE and for pruned media.
        settings: Method and budget.
    """

    def __init__(self, model: Any, settings: Settings) -> None:
        self.original, self.settings = model.get_mrope_input_positions, settings
        self.rewrite = model.recompute_mrope_positions
        self.image, self.video = model.config.image_token_id, model.config.video_token_id

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

    def recompute(
        self,
        input_ids: Sequence[int] | Tensor,
        multimodal_embeddings: Sequence[Tensor],
        mrope_positions: Tensor,
        num_computed_tokens: int,
    ) -> tuple[Sequence[Tensor], Tensor, int]:
        """Features without their positions, the prompt's positions with those, and what decoding adds to its length.

        Args:
            input_ids: `[T]` the whole prompt.
            multimodal_embeddings: Features of this step, with their positions in the image in further channels.
            mrope_positions: `[3, T]` as they were.
            num_computed_tokens: Where this step begins.
        """
        ids = torch.as_tensor(input_ids)
        if not len(multimodal_embeddings) or bool((ids == self.video).any()):  # videos carry more than positions
            return self.rewrite(input_ids, multimodal_embeddings, mrope_positions, num_computed_tokens)
        # Where everything is computed the model only takes its channels off.
        features, _, _ = self.rewrite(input_ids, multimodal_embeddings, mrope_positions, len(ids))
        pairs = zip(multimodal_embeddings, features, strict=True)
        inside = torch.cat([given[:, left.shape[1] :][:, :3] for given, left in pairs]).T
        positions = mrope_positions.clone()
        image = (ids == self.image).to(positions.device)
        columns = image.nonzero()[:, 0]
        columns = columns[columns >= num_computed_tokens][: inside.shape[1]]
        text = torch.where(image, -1, torch.arange(len(ids), device=positions.device)).cummax(0).values[columns]
        start = torch.where(text >= 0, positions[:, text.clamp_min(0)].amax(0) + 1, 0)
        positions[:, columns] = inside.to(positions) + start
        return features, positions, int(positions.max()) + 1 - len(ids)

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
            count, size = next((c for c in counts if c[0]), (0, 0))  # groups that keep nothing left no placeholder
            out += [piece[at]] * size
            kept += [number < count for number in range(size)]
            at += max(count, 1)
        return out, torch.tensor(kept, dtype=torch.bool)
