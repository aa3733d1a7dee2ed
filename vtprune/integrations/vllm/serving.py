# SPDX-License-Identifier: Apache-2.0
"""One pruned model inside a vLLM worker: its `embed_multimodal` returns the features that stay."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from . import choosing, mrope, readers
from .prompts import RUNS
from .settings import ServingError, Settings

logger = logging.getLogger("vllm.vtprune")


class Pruner:
    """Stands in front of a model's `embed_multimodal`.

    Args:
        model: An instance of a vLLM model class, weights not loaded yet.
        config: Its `VllmConfig`.
        settings: Method and budget.
    """

    def __init__(self, model: Any, config: Any, settings: Settings) -> None:
        self.settings, self.embed = settings, model.embed_multimodal
        self.width = config.model_config.hf_text_config.hidden_size
        self.ranks = config.parallel_config.tensor_parallel_size
        self.reader = readers.make(model, config.model_config.uses_mrope, settings.method)

    @classmethod
    def attach(cls, model: Any, config: Any, settings: Settings) -> None:
        """Gives an instance its own `embed_multimodal`; the class is not changed."""
        pruner = cls(model, config, settings)
        object.__setattr__(model, "vtprune", pruner)  # not a submodule, and not looked for as one
        object.__setattr__(model, "embed_multimodal", pruner)
        # Captured encoder graphs return features without asking embed_multimodal.
        object.__setattr__(model, "supports_encoder_cudagraph", False)
        if config.model_config.uses_mrope:
            positions = mrope.Positions(model, settings)
            object.__setattr__(model, "get_mrope_input_positions", positions)
            object.__setattr__(model, "recompute_mrope_positions", positions.recompute)
        logger.info("vtprune: %s, chosen before the decoder of %s", settings, type(model).__name__)

    def __call__(self, **kwargs: Any) -> Any:
        """What the model returns for the items of a call, images pruned."""
        runs = kwargs.pop(RUNS, None)
        if runs is None:  # another modality
            return self.embed(**kwargs)
        with self.reader.watch() as seen:
            features = list(self.embed(**kwargs))
        runs = [[int(n) for n in item] for item in runs]
        if len(features) != len(runs):
            raise ServingError(f"vtprune: {len(runs)} images went in and {len(features)} came out of embed_multimodal")
        extra = self.reader.extra(seen)
        chosen = choosing.prune(features, runs, self.settings, self.width, self._grids(kwargs, runs), extra)
        return self._agree(chosen)

    def _grids(self, kwargs: dict[str, Any], runs: list[list[int]]) -> list[list[int]] | None:
        """Frames, rows and columns of each image's tokens, from the patches that Qwen-VL and its kin count."""
        given = kwargs.get("image_grid_thw")
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
