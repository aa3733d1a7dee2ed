# SPDX-License-Identifier: Apache-2.0
"""The models that are served, and how each writes an image into a prompt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_tests import models, vision_models
from vllm_tests.plans import Request

from vtprune.integrations.vllm.settings import QUESTION_FREE


@dataclass(frozen=True)
class Family:
    """A model.

    Attributes:
        build: Writes it to a folder.
        image: What stands for an image in a prompt; nothing, where images come first anyway.
        several: Whether a prompt may hold several images.
        text_only: Whether a prompt may hold none.
        mrope: Whether positions have several axes.
        torchvision: Whether vLLM's class imports it.
        methods: To try.
        engine: Options of `LLM`.
    """

    build: Callable[[Path], None]
    image: str = "<image>"
    several: bool = True
    text_only: bool = True
    mrope: bool = False
    torchvision: bool = False
    methods: tuple[str, ...] = QUESTION_FREE
    engine: dict[str, Any] = field(default_factory=dict)

    def prompt(self, request: Request) -> str:
        """The text of a request, with what stands for an image."""
        return " ".join(request.text.replace("@", self.image).split())


QWEN = "<|vision_start|> <|image_pad|> <|vision_end|>"
NO_VIDEO = {"limit_mm_per_prompt": {"image": 4, "video": 0}}  # or the largest video would rule the encoder's budget
READING = ("divprune", "iwp", "scope", "visionzip", "zoo_prune")  # what reads other parts of the model, and the default
FAMILIES = {
    "idefics3": Family(models.MODELS["idefics3"], methods=QUESTION_FREE),
    "idefics3-transformers": Family(models.MODELS["idefics3"], methods=READING, engine={"model_impl": "transformers"}),
    "smolvlm": Family(models.MODELS["smolvlm"], methods=("divprune", "iwp", "pooling")),
    "paligemma": Family(models.MODELS["paligemma"], image="", several=False, text_only=False, methods=READING),
    "llava": Family(vision_models.llava, methods=("divprune", "iwp", "scope", "visionzip"), torchvision=True),
    "internvl": Family(
        vision_models.internvl,
        "<IMG_CONTEXT>",
        methods=("divprune", "visionzip", "zoo_prune"),
        torchvision=True,
        engine=NO_VIDEO,
    ),
    "qwen2_5_vl": Family(
        vision_models.qwen2_5_vl,
        QWEN,
        mrope=True,
        methods=("divprune", "iwp", "pooling", "resprune"),
        torchvision=True,
        engine=NO_VIDEO,
    ),
    "qwen3_vl": Family(
        vision_models.qwen3_vl,
        QWEN,
        mrope=True,
        methods=("divprune", "iwp", "pooling", "resprune"),
        torchvision=True,
        engine=NO_VIDEO,
    ),
}
