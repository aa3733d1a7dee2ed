# SPDX-License-Identifier: Apache-2.0
"""The served models, and the text that stands for an image or a clip in their prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_tests import models, plans, vision_models
from vllm_tests.plans import Request, Run

from vtprune.integrations.vllm.settings import QUESTION_FREE


@dataclass(frozen=True)
class Family:
    """A served model.

    Attributes:
        build: Writes the model to a folder.
        image: Text for an image in a prompt; empty if images always come first.
        clip: Text for a clip; empty if none is tested.
        several: Whether a prompt may hold several images.
        text_only: Whether a prompt may hold none.
        mrope: Whether the model has M-RoPE positions.
        torchvision: Whether vLLM's class imports torchvision.
        methods: Tested methods; methods for clips if `clip` is set.
        tower: Whether one more engine cuts the vision tower.
        engine: Options of `LLM`.
    """

    build: Callable[[Path], None]
    image: str = "<image>"
    clip: str = ""
    several: bool = True
    text_only: bool = True
    mrope: bool = False
    torchvision: bool = False
    methods: tuple[str, ...] = QUESTION_FREE
    tower: bool = False
    engine: dict[str, Any] = field(default_factory=dict)

    def prompt(self, request: Request) -> str:
        """The text of a request, with placeholders for images and clips."""
        return " ".join(request.text.replace("@", self.image).replace("%", self.clip).split())

    def requests(self) -> list[Request]:
        """The requests, in order."""
        asked = plans.requests(self.several, self.text_only)
        return asked + plans.clip_requests() if self.clip else asked

    def runs(self) -> list[Run]:
        """The engines that answer them."""
        return plans.clip_runs(self.methods) if self.clip else plans.runs(self.methods, self.tower)


QWEN = "<|vision_start|> <|image_pad|> <|vision_end|>"
QWEN_CLIP = "<|vision_start|><|video_pad|><|vision_end|>"
NO_VIDEO = {"limit_mm_per_prompt": {"image": 4, "video": 0}}  # else the largest video sets the encoder budget
CLIPS = {"limit_mm_per_prompt": {"image": 3, "video": 2}}
READING = (
    "divprune",
    "iwp",
    "resprune",
    "scope",
    "visionzip",
    "zoo_prune",
)  # methods that read other parts of the model, and the default
FAMILIES = {
    "idefics3": Family(models.MODELS["idefics3"], methods=QUESTION_FREE),
    "idefics3-transformers": Family(models.MODELS["idefics3"], methods=READING, engine={"model_impl": "transformers"}),
    "smolvlm": Family(models.MODELS["smolvlm"], methods=("divprune", "iwp", "resprune")),
    "paligemma": Family(
        models.MODELS["paligemma"], image="", several=False, text_only=False, methods=READING, tower=True
    ),
    "llava": Family(
        vision_models.llava, methods=("divprune", "iwp", "resprune", "scope", "visionzip"), torchvision=True
    ),
    "internvl": Family(
        vision_models.internvl,
        "<IMG_CONTEXT>",
        methods=("divprune", "resprune", "visionzip", "zoo_prune"),
        torchvision=True,
        engine=NO_VIDEO,
    ),
    "qwen2_5_vl": Family(
        vision_models.qwen2_5_vl,
        QWEN,
        mrope=True,
        tower=True,
        methods=("divprune", "iwp", "pooling", "resprune"),
        torchvision=True,
        engine=NO_VIDEO,
    ),
    "qwen3_vl": Family(
        vision_models.qwen3_vl,
        QWEN,
        mrope=True,
        tower=True,
        methods=("divprune", "iwp", "pooling", "resprune"),
        torchvision=True,
        engine=NO_VIDEO,
    ),
    "qwen2_5_vl-clips": Family(
        vision_models.qwen2_5_vl,
        QWEN,
        QWEN_CLIP,
        mrope=True,
        methods=("evs", "vidcom2", "iwp"),
        torchvision=True,
        engine=CLIPS,
    ),
    "qwen3_vl-clips": Family(
        vision_models.qwen3_vl,
        QWEN,
        QWEN_CLIP,
        mrope=True,
        methods=("evs", "vcast", "dycoke", "pooling"),
        torchvision=True,
        engine=CLIPS,
    ),
    "qwen3_vl_moe-clips": Family(
        vision_models.qwen3_vl_moe, QWEN, QWEN_CLIP, mrope=True, methods=("vidcom2",), torchvision=True, engine=CLIPS
    ),
}
