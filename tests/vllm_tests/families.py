# SPDX-License-Identifier: Apache-2.0
"""The models that are served, and how each writes an image into a prompt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_tests import models, plans
from vllm_tests.plans import Request


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
    methods: tuple[str, ...] = plans.METHODS
    engine: dict[str, Any] = field(default_factory=dict)

    def prompt(self, request: Request) -> str:
        """The text of a request, with what stands for an image."""
        return " ".join(request.text.replace("@", self.image).split())


FAMILIES = {
    "idefics3": Family(models.MODELS["idefics3"]),
    "idefics3-transformers": Family(models.MODELS["idefics3"], engine={"model_impl": "transformers"}),
    "smolvlm": Family(models.MODELS["smolvlm"], methods=("divprune", "pooling")),
    "paligemma": Family(models.MODELS["paligemma"], image="", several=False, text_only=False),
}
