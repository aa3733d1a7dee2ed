# SPDX-License-Identifier: Apache-2.0
"""Reference answers for M-RoPE models: all remaining tokens keep their positions of the unpruned prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from vllm_tests.plans import Request
from vllm_tests.reference import Reference

from vtprune.integrations.vllm import readers, selection
from vtprune.integrations.vllm.settings import Settings


class MRoPEReference(Reference):
    """A Qwen-VL of transformers run on the kept columns, with their positions in the whole prompt."""

    def __init__(self, folder: Path, settings: Settings | None, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(folder, settings, dtype)
        if settings is not None:
            self.reader = readers.make(self.model, True, settings.video_method)

    def answer(self, text: str, request: Request, tokens: int) -> tuple[int, list[int]]:
        """Length of the pruned prompt, and the generated tokens."""
        inputs = self._inputs(text, request)
        with self.reader.watch() as seen:
            states, deep, positions = self._decoder_inputs(inputs)
        positions = self._after_clips(positions, self._items(inputs))
        end = int(positions.max()) + 1
        ids = inputs["input_ids"][0]
        if self.settings is not None:
            # DeepStack features are appended as channels.
            width, channels = states.shape[1], torch.cat([states, *deep], 1)
            stays = torch.ones(len(ids), dtype=torch.bool)
            for columns, modality, grid in self._items(inputs):
                feature, size, extra = channels[columns], [len(columns)], self.reader.extra(seen)
                sizes, counts = [len(columns) // grid[0]] * grid[0], self.settings.counts(size)
                method = self.settings.method_for(modality, sizes, counts[0])
                (chosen, kept), *_ = selection.prune([feature], [size], [counts], method, width, [grid], extra)
                stays[columns] = False
                stays[columns[kept]] = True
                channels[columns[kept]] = chosen
            channels, positions = channels[stays], positions[..., stays]
            states, *deep = channels.split(width, 1)
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

    def runs(self, text: str, request: Request) -> list[list[int]]:
        """Number of placeholders of each image and clip."""
        return [[len(columns)] for columns, _, _ in self._items(self._inputs(text, request))]

    def _inputs(self, text: str, request: Request) -> dict[str, Any]:
        """The processor's output for a prompt, with all frames of clips."""
        given: dict[str, Any] = {"images": request.pictures() or None}
        if request.clips:
            frames, facts = zip(*request.videos(), strict=True)
            facts = [{k: v for k, v in fact.items() if k != "do_sample_frames"} for fact in facts]
            given |= {"videos": list(frames), "video_metadata": facts, "do_sample_frames": False}
        return dict(self.processor(**given, text=text, return_tensors="pt", return_mm_token_type_ids=True))

    def _items(self, inputs: dict[str, Any]) -> list[tuple[torch.Tensor, str, list[int]]]:
        """Columns, modality and grid of every image and clip, in prompt order."""
        ids, out = inputs["input_ids"][0], []
        for modality in ("image", "video"):
            columns = (ids == getattr(self.model.config, f"{modality}_token_id")).nonzero()[:, 0]
            grids = [[t, h // 2, w // 2] for t, h, w in inputs.get(f"{modality}_grid_thw", torch.empty(0, 3)).tolist()]
            parts = columns.split([t * h * w for t, h, w in grids])
            out += [(part, modality, grid) for part, grid in zip(parts, grids, strict=True)]
        return sorted(out, key=lambda item: int(item[0][0]))

    def _decoder_inputs(self, inputs: dict[str, Any]) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
        """States `[T, D]`, the DeepStack features `[T, D]` of each level, and positions `[3, T]`."""
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
        positions = given["position_ids"]  # absent without images: consecutive positions
        return states, deep, torch.arange(len(states)).expand(3, -1) if positions is None else positions[-3:, 0]

    def _after_clips(self, positions: torch.Tensor, items: list[Any]) -> torch.Tensor:
        """Positions `[3, T]` in which text after a clip follows its largest position, as in vLLM and in Qwen's code.

        transformers 5.19 continues after the rows and columns of a Qwen2.5-VL clip, ignoring larger time positions.
        """
        positions = positions.clone()
        for columns, _, _ in items:
            after = int(columns[-1]) + 1
            if after < positions.shape[1]:
                positions[:, after:] += positions[:, columns].max() + 1 - positions[0, after]
        return positions

    def _decode(self, states: torch.Tensor, deep: list[torch.Tensor], positions: torch.Tensor) -> torch.Tensor:
        """Output `[D]` of the last column."""
        extra: dict[str, Any] = {}
        if deep:
            everywhere = torch.ones(1, len(states), dtype=torch.bool)
            extra = {"visual_pos_masks": everywhere, "deepstack_visual_embeds": deep}
        out = self.model.model.language_model(
            inputs_embeds=states[None], position_ids=positions[:, None], use_cache=False, **extra
        )
        return out.last_hidden_state[0, -1]
