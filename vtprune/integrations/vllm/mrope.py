# SPDX-License-Identifier: Apache-2.0
"""M-RoPE: kept tokens of images and clips, and the text after them, stand where they stood in the unpruned prompt.

vLLM asks for the positions of a whole prompt before its images are encoded, and its interface for pruned media
(`SupportsMultiModalPruning`) puts in those of the kept tokens afterwards. What is answered first are the positions of
the unpruned prompt without the columns that are gone: those of text outside of images and clips are right and stay.
Afterwards only columns of images and clips are written, each relative to the text before it, so that chunks, a cached
prefix or a request that starts over change nothing.

Where a model writes text between the frames of a clip, how many tokens each frame keeps is known only when the tokens
are chosen. vLLM then takes features for the text as well, and so the rows of such a clip are its tokens and its text.

Features carry their places in further channels, as digits to base 256, which every type of features counts exactly.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from . import selection
from .prompts import IDS
from .settings import ServingError

_DIGITS, _ZERO = 3, 1 << 23  # of a number from -2**23 to 2**23 - 1
_NUMBERS = 6  # column, end and three positions, counted from the item's first placeholder, and that one's token id
_CHANNELS = _DIGITS * _NUMBERS
# On a request's positions: the largest of its prompt. If that ends in a picture, a dropped token may have it.
_LAST = "_vtprune_last"


def write_digits(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """`[n, k]` whole numbers as `[n, 3 k]` digits to base 256."""
    shifted = numbers + _ZERO
    return torch.cat([shifted >> 16, (shifted >> 8) & 255, shifted & 255], 1).to(dtype)


def read_digits(digits: Tensor) -> Tensor:
    """`[n, k]` whole numbers from `[n, 3 k]` digits."""
    high, middle, low = digits.long().chunk(_DIGITS, 1)
    return (high << 16) + (middle << 8) + low - _ZERO


class Positions:
    """Stands in front of a model's `get_mrope_input_positions` and `recompute_mrope_positions`.

    Args:
        model: A model with vLLM's interfaces for M-RoPE and for pruned media.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.original = model, model.get_mrope_input_positions
        self.tokens = {m: getattr(model.config, f"{m}_token_id") for m in ("image", "video")}

    def __call__(self, input_tokens: Sequence[int], mm_features: Sequence[Any]) -> tuple[Tensor, int]:
        """`[3, T]` positions of a prompt with pruned images and clips, and what decoding adds to its length."""
        tokens, features, stays = list(input_tokens), [], torch.ones(len(input_tokens), dtype=torch.bool)
        grown = 0
        for feature in sorted(mm_features, key=lambda f: f.mm_position.offset):
            place = feature.mm_position
            start, length = place.offset + grown, place.length
            if feature.data is not None and IDS in feature.data:
                full = feature.data[IDS].data
                tokens[start : start + length] = full.tolist()
                visual = self._visual(full)
                text = int((~visual).sum())
                stays = torch.cat(
                    [stays[:start], ~visual | (visual.cumsum(0) <= length - text), stays[start + length :]]
                )
                grown, length = grown + len(full) - length, len(full)
            features.append(
                dataclasses.replace(
                    feature, mm_position=dataclasses.replace(place, offset=start, length=length, is_embed=None)
                )
            )
        positions = torch.as_tensor(self.original(tokens, features)[0])
        return positions[..., stays], int(positions.max()) + 1 - len(input_tokens)

    def carry(
        self, feature: Tensor, kept: Tensor, ids: Tensor, modality: str, about: dict[str, Any], width: int
    ) -> Tensor:
        """The rows of an image or a clip with its text between frames, and each row's place in further channels.

        Args:
            feature: `[n, C]` features of the tokens that stay, in order.
            kept: `[n]` which of its tokens they are.
            ids: `[L]` its part of the unpruned prompt, on the CPU.
            modality: `image` or `video`.
            about: What the model's positions need to know of it, such as its grid.
            width: Of the decoder.
        """
        if feature.shape[1] % width:
            raise ServingError(
                f"vtprune: features have {feature.shape[1]} channels, and the decoder {width}: this model adds some "
                "that are not known, and cannot be pruned"
            )
        device = feature.device
        visual = self._visual(ids)
        places = self._inside(ids, modality, about)
        lead = int(visual.int().argmax())
        end = int(places.max()) + 1
        feature, rows = selection.with_text(feature, kept, ids, visual, self.model, width)
        column = torch.arange(len(rows), device=device)
        numbers = torch.stack([column, torch.full_like(column, end), *places.to(device)[:, rows]], 1) - lead
        token = torch.full_like(numbers[:, :1], int(ids[lead]))
        return torch.cat([feature, write_digits(torch.cat([numbers, token], 1), feature.dtype)], 1)

    def recompute(
        self,
        input_ids: Sequence[int] | Tensor,
        multimodal_embeddings: Sequence[Tensor],
        mrope_positions: Tensor,
        num_computed_tokens: int,
    ) -> tuple[Sequence[Tensor], Tensor, int]:
        """Features without their places, the prompt's positions with those, and what decoding adds to its length.

        Args:
            input_ids: `[T]` the whole prompt.
            multimodal_embeddings: Features of this step, as `carry` made them, each perhaps a part of an image or clip.
            mrope_positions: `[3, T]` as they were.
            num_computed_tokens: Where this step begins.
        """
        if not multimodal_embeddings:  # most steps: vLLM asks for every request that is running
            last = getattr(mrope_positions, _LAST, None)
            last = int(mrope_positions.max()) if last is None else last
            return [], mrope_positions, last + 1 - len(input_ids)
        positions, features = mrope_positions.cpu().clone(), []
        prompt = torch.as_tensor(input_ids).cpu()
        visual = self._visual(prompt)
        starts = (visual & (prompt != torch.nn.functional.pad(prompt, (1, 0), value=-1)[:-1])).nonzero()[:, 0]
        last, at = int(positions.max()), num_computed_tokens
        for given in multimodal_embeddings:
            features.append(given[:, :-_CHANNELS])
            column, end, *inside, token = read_digits(given[:, -_CHANNELS:].cpu()).T
            # Its first placeholder: the next of the same token id with room before it. Text may contain others.
            fits = starts[(starts + column[0] >= at) & (prompt[starts] == token[0])]
            if not len(fits):
                raise ServingError(
                    "vtprune: features of an image that is not in the prompt; report it with the model's name"
                )
            start = int(fits[0])
            before = int(positions[:, start - 1].max()) + 1 if start else 0
            positions[:, start + column] = torch.stack(inside).to(positions) + before
            last, at = max(last, before + int(end[0]) - 1), start + int(column[-1]) + 1
        setattr(mrope_positions, _LAST, last)  # vLLM copies the new positions into this tensor, which later steps get
        return features, positions.to(mrope_positions.device), last + 1 - len(visual)

    def _visual(self, ids: Tensor) -> Tensor:
        """`[T]` bool, True for placeholders of images and videos."""
        return torch.isin(ids, torch.tensor(list(self.tokens.values())))

    def _inside(self, ids: Tensor, modality: str, about: dict[str, Any]) -> Tensor:
        """`[3, L]` positions of an image or clip that the prompt begins with, by the model's own rule."""
        place = SimpleNamespace(offset=0, length=len(ids), is_embed=None)
        data = {name: SimpleNamespace(data=value) for name, value in about.items()}
        spec = SimpleNamespace(data=data, modality=modality, mm_position=place)  # as vLLM's MultiModalFeatureSpec
        return torch.as_tensor(self.original(ids.tolist(), [spec])[0])
