# SPDX-License-Identifier: Apache-2.0
"""The same cut in transformers for models with M-RoPE: what is kept stands where it stood, and so does what follows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from vllm_tests.reference import Reference

from vtprune.integrations.vllm import choosing, readers
from vtprune.integrations.vllm.settings import Settings


class MRoPEReference(Reference):
    """A Qwen-VL of transformers that is given fewer columns, with the positions that they had in the whole prompt."""

    def __init__(self, folder: Path, settings: Settings | None, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(folder, settings, dtype)
        if settings is not None:
            self.reader = readers.make(self.model, True, settings.method)

    def answer(self, text: str, images: list[Image.Image], tokens: int) -> tuple[int, list[int]]:
        """Length of the pruned prompt, and the tokens after it."""
        inputs = dict(
            self.processor(images=images or None, text=text, return_tensors="pt", return_mm_token_type_ids=True)
        )
        with self.reader.watch() as seen:
            states, deep, positions = self._decoder_inputs(inputs)
        end = int(positions.max()) + 1
        ids = inputs["input_ids"][0]
        if self.settings is not None and images:
            # Deeper features and the number of its column go along with each feature, in further channels.
            channels = torch.cat([states, *deep, torch.arange(len(ids))[:, None]], 1)
            grids = [[1, h // 2, w // 2] for _, h, w in inputs["image_grid_thw"].tolist()]
            channels = self._cut_with(channels, self._runs(ids, len(images)), states.shape[1], grids, seen)
            width = states.shape[1]
            states, kept = channels[:, :width], channels[:, -1].long()
            deep = list(channels[:, width:-1].split(width, 1))
            positions = positions[..., kept]
        length, out = len(states), []
        embed = self.model.get_input_embeddings()
        with torch.no_grad():
            for number in range(tokens):
                hidden = self._decode(states, deep, positions)
                out.append(int(self.model.lm_head(hidden).argmax()))
                states = torch.cat([states, embed(torch.tensor([out[-1]]))])
                deep = [torch.cat([d, torch.zeros_like(d[:1])]) for d in deep]
                positions = torch.cat([positions, torch.full_like(positions[..., :1], end + number)], -1)
        return length, out

    def _decoder_inputs(self, inputs: dict[str, Any]) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
        """`[T, D]` states, for each deep level `[T, D]` what is added after it, and `[3, T]` positions."""
        seen: list[dict[str, Any]] = []
        decoder = self.model.model.language_model
        hook = decoder.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs), with_kwargs=True)
        with torch.no_grad():
            self.model(**inputs)
        hook.remove()
        given = seen[0]
        states = given["inputs_embeds"][0]
        deep = []
        for level in given.get("deepstack_visual_embeds") or []:
            full = torch.zeros_like(states)
            full[given["visual_pos_masks"][0]] = level
            deep.append(full)
        positions = given["position_ids"]  # none without images: one after the other
        return states, deep, torch.arange(len(states)).expand(3, -1) if positions is None else positions[-3:, 0]

    def _cut_with(self, channels: torch.Tensor, images: Any, width: int, grids: Any, seen: Any) -> torch.Tensor:
        assert self.settings is not None
        pieces, at = [], 0
        for ((start, length),), grid in zip(images, grids, strict=True):
            feature = channels[start : start + length]
            extra = self.reader.extra(seen)
            kept = choosing.prune([feature], [[length]], self.settings, width, [grid], extra)[0]
            pieces += [channels[at:start], kept]
            at = start + length
        return torch.cat([*pieces, channels[at:]])

    def _decode(self, states: torch.Tensor, deep: list[torch.Tensor], positions: torch.Tensor) -> torch.Tensor:
        """`[D]` the last column's output."""
        extra: dict[str, Any] = {}
        if deep:
            everywhere = torch.ones(1, len(states), dtype=torch.bool)
            extra = {"visual_pos_masks": everywhere, "deepstack_visual_embeds": deep}
        out = self.model.model.language_model(
            inputs_embeds=states[None], position_ids=positions[:, None], use_cache=False, **extra
        )
        return out.last_hidden_state[0, -1]
