# SPDX-License-Identifier: Apache-2.0
"""One pruned model inside a vLLM worker: its `embed_multimodal` returns the features that stay."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from . import mrope, readers, selection, towers
from .prompts import COUNTS, IDS, RUNS, VISUAL, runs_of
from .settings import ServingError, Settings

logger = logging.getLogger("vllm.vtprune")


class Pruner:
    """Stands in front of a model's `embed_multimodal`.

    Args:
        model: An instance of a vLLM model class, weights not loaded yet.
        config: Its `VllmConfig`.
        settings: Methods and budget.
    """

    def __init__(self, model: Any, config: Any, settings: Settings) -> None:
        self.settings, self.model, self.embed = settings, model, model.embed_multimodal
        self.width = config.model_config.hf_text_config.hidden_size
        self.ranks = config.parallel_config.tensor_parallel_size
        self.positions = mrope.Positions(model) if config.model_config.uses_mrope else None
        self.chooses = _is_first_stage(config)
        if not self.chooses:
            return
        # Images alone are pruned where positions have one axis.
        modalities = ("image",) if self.positions is None else ("image", "video")
        self.readers = {
            modality: readers.make(model, self.positions is not None, method)
            for modality, method in zip(modalities, (settings.method, settings.video_method), strict=False)
        }
        if settings.tower is not None:
            towers.cut(model, settings.tower)

    @classmethod
    def attach(cls, model: Any, config: Any, settings: Settings) -> None:
        """Gives an instance its own `embed_multimodal`; the class is not changed."""
        pruner = cls(model, config, settings)
        object.__setattr__(model, "vtprune", pruner)  # not a submodule, and not looked for as one
        object.__setattr__(model, "embed_multimodal", pruner)
        # Captured encoder graphs return features without asking embed_multimodal.
        object.__setattr__(model, "supports_encoder_cudagraph", False)
        if pruner.positions is not None:
            object.__setattr__(model, "is_multimodal_pruning_enabled", False)  # features as they are, nothing of EVS
            object.__setattr__(model, "get_mrope_input_positions", pruner.positions)
            object.__setattr__(model, "recompute_mrope_positions", pruner.positions.recompute)
        logger.info("vtprune: %s, chosen before the decoder of %s", settings, type(model).__name__)

    def __call__(self, **kwargs: Any) -> Any:
        """What the model returns for the items of a call, images and clips pruned."""
        runs, counts, ids = (kwargs.pop(name, None) for name in (RUNS, COUNTS, IDS))
        if runs is None or not self.chooses:  # another modality, or a later stage that measures its memory
            return self.embed(**kwargs)
        modality = "image" if kwargs.get("video_grid_thw") is None else "video"
        with self.readers[modality].watch() as seen:
            features = list(self.embed(**kwargs))
        runs, counts = ([[int(n) for n in item] for item in field] for field in (runs, counts))
        if len(features) != len(runs):
            raise ServingError(f"vtprune: {len(runs)} items went in and {len(features)} came out of embed_multimodal")
        parts = [torch.as_tensor(part) for part in ids]
        grids = self._grids(kwargs.get(f"{modality}_grid_thw"), runs)
        if self.positions is None:
            grids = [_grid_of_rows(part == VISUAL) for part in parts]
        chosen = self._choose(features, runs, counts, modality, grids, seen)
        if self.positions is None:
            return self._agree([self._with_text(*pair, part) for pair, part in zip(chosen, parts, strict=True)])
        carried = []
        for number, ((feature, kept), part) in enumerate(zip(chosen, parts, strict=True)):
            facts = {n: kwargs[n][number] for n in (f"{modality}_grid_thw", "second_per_grid_ts") if n in kwargs}
            carried.append(self.positions.carry(feature, kept, part, modality, facts, self.width))
        return self._agree(carried)

    def _choose(
        self,
        features: list[Tensor],
        runs: list[list[int]],
        counts: list[list[int]],
        modality: str,
        grids: list[Any] | None,
        seen: Any,
    ) -> list[tuple[Tensor, Tensor]]:
        """For each item the features that stay and which of its tokens they are; items of one method together."""
        groups: dict[str, list[int]] = {"image": [], "video": []}
        for item, (lengths, kept) in enumerate(zip(runs, counts, strict=True)):
            frames = grids[item][0] if grids is not None and modality == "video" else 1
            method = self.settings.method_for(modality, [sum(lengths) // frames] * frames, sum(kept))
            groups[modality if method is self.settings.video_method else "image"].append(item)
        out: dict[int, tuple[Tensor, Tensor]] = {}
        for kind, items in groups.items():
            if items:
                method = self.settings.video_method if kind == "video" else self.settings.method
                chosen = selection.prune(
                    [features[item] for item in items],
                    [runs[item] for item in items],
                    [counts[item] for item in items],
                    method,
                    self.width,
                    None if grids is None else [grids[item] for item in items],
                    self.readers[kind].extra(seen),
                )
                out |= dict(zip(items, chosen, strict=True))
        return [out[item] for item in range(len(features))]

    def _with_text(self, feature: Tensor, kept: Tensor, ids: Tensor) -> Tensor:
        """The features of an image that stay, with the text between its rows."""
        if not len(ids):
            return feature
        return selection.with_text(feature, kept, ids, ids == VISUAL, self.model, self.width)[0]

    def _grids(self, given: Any, runs: list[list[int]]) -> list[Any] | None:
        """Frames, rows and columns of each item's tokens, from the patches that Qwen-VL and its kin count."""
        if given is None:
            return None
        out = []
        for (t, h, w), lengths in zip(torch.as_tensor(given).reshape(-1, 3).tolist(), runs, strict=True):
            merge = round((t * h * w / max(sum(lengths), 1)) ** 0.5)
            out.append([t, h // max(merge, 1), w // max(merge, 1)])
        return out

    def _agree(self, chosen: list[Tensor]) -> list[Tensor]:
        """The same features on every tensor-parallel rank, whatever the last bit of a score was on each."""
        if self.ranks == 1:
            return chosen
        from vllm.distributed import get_tp_group

        flat = get_tp_group().broadcast(torch.cat(chosen).contiguous(), src=0)
        return list(flat.split([len(x) for x in chosen]))


def _is_first_stage(config: Any) -> bool:
    """Whether this process has the first stage of a pipeline: embeddings, and the decoder's first layers."""
    if config.parallel_config.pipeline_parallel_size == 1:
        return True
    from vllm.distributed import get_pp_group

    return bool(get_pp_group().is_first_rank)


def _grid_of_rows(visual: Tensor) -> list[int] | None:
    """Frames, rows and columns of an image that is written row by row; None for others."""
    rows = runs_of(visual)
    return [1, len(rows), rows[0]] if rows else None
