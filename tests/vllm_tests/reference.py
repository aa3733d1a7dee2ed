# SPDX-License-Identifier: Apache-2.0
"""Greedy reference answers of transformers with the same cut as vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from vllm_tests.plans import Request

import vtprune
from vtprune.integrations.vllm import prompts, readers, selection
from vtprune.integrations.vllm.settings import Settings


class Reference:
    """A transformers model run on the prompt without the dropped columns, with consecutive positions."""

    def __init__(self, folder: Path, settings: Settings | None, dtype: torch.dtype = torch.float32) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.processor = AutoProcessor.from_pretrained(folder)
        self.model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).eval()
        self.settings = settings
        if settings is not None and settings.tower is not None:
            vtprune.patch(self.model, tower=settings.tower)
        method = None if settings is None else settings.method
        # The reader of vLLM's Transformers back end, which reads transformers' modules.
        self.reader = readers.Reader() if method is None else readers.make(self.model, False, method)

    def answer(self, text: str, request: Request, tokens: int) -> tuple[int, list[int]]:
        """Length of the pruned prompt, and the generated tokens."""
        images = request.pictures()
        inputs = self.processor(images=images or None, text=text, return_tensors="pt")
        inputs = {name: value for name, value in inputs.items() if name != "token_type_ids"}
        with self.reader.watch() as seen:
            states = self._merged(inputs)
        extra = self.reader.extra(seen)
        if self.settings is not None and images:
            states = self._cut(states[0], self._runs(inputs["input_ids"][0], len(images)), extra)[None]
        out = []
        length = states.shape[1]
        embed = self.model.get_input_embeddings()
        with torch.no_grad():
            for _ in range(tokens):  # no cache; default positions 0, 1, 2, ...
                logits = self.model(inputs_embeds=states, use_cache=False).logits[0, -1]
                out.append(int(logits.argmax()))
                states = torch.cat([states, embed(torch.tensor([[out[-1]]]))], 1)
        return length, out

    def runs(self, text: str, request: Request) -> list[list[int]]:
        """Lengths of the placeholder runs of each image."""
        if not request.images:
            return []
        ids = self.processor(images=request.pictures(), text=text, return_tensors="pt")["input_ids"][0]
        return [[length for _, length in image] for image in self._runs(ids, len(request.images))]

    def _merged(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Decoder input `[1, T, D]` of the whole prompt."""
        base = self.model.model
        decoder = next(getattr(base, name) for name in ("text_model", "language_model") if hasattr(base, name))
        seen: list[torch.Tensor] = []
        hook = decoder.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
        )
        with torch.no_grad():
            self.model(**inputs)
        hook.remove()
        return seen[0]

    def _runs(self, ids: torch.Tensor, images: int) -> list[list[tuple[int, int]]]:
        """Start and length of the placeholder runs of each image."""
        mask = ids == self.model.config.image_token_id
        edges = torch.nn.functional.pad(mask.int(), (1, 1)).diff()
        starts = (edges == 1).nonzero()[:, 0].tolist()
        runs = list(zip(starts, prompts.runs_of(mask), strict=True))
        # Images are separated by words, tiles only by tags.
        words = set(self.processor.tokenizer.convert_tokens_to_ids([f"word{i}" for i in range(60)]))
        out: list[list[tuple[int, int]]] = [[]]
        for number, run in enumerate(runs):
            before = ids[runs[number - 1][0] : run[0]].tolist() if number else []
            if words & set(before):
                out.append([])
            out[-1].append(run)
        assert len(out) == images
        return out

    def _cut(self, states: torch.Tensor, images: list[list[tuple[int, int]]], extra: dict) -> torch.Tensor:
        assert self.settings is not None
        pieces, at = [], 0
        for runs in images:
            features = torch.cat([states[start : start + length] for start, length in runs])
            sizes = [length for _, length in runs]
            method, counts = self.settings.method, self.settings.counts(sizes)
            kept = selection.prune([features], [sizes], [counts], method, states.shape[1], extra=extra)[0][0]
            for (start, length), part in zip(runs, kept.split(counts), strict=True):
                pieces += [states[at:start], part]
                at = start + length
        return torch.cat([*pieces, states[at:]])
