# SPDX-License-Identifier: Apache-2.0
"""Prompts for a model with a processor: the user's picture or clip, or noise with a given number of visual tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..engine.patching import inspect
from ..errors import InputError, one_line
from ..refvlm import loading
from ..study.resize import Frames, shrinking

if TYPE_CHECKING:
    from PIL.Image import Image

    from .measure import Setting

SIDES = (224, 336, 448, 672, 896, 1344, 1792)  # sides of the pictures to try, in pixels
MOST_PICTURES = 16
QUESTION = "What is in the picture?"


def of_processor(
    model: Any, processor: Any, picture: Image | Frames | None, question: str | None, setting: Setting
) -> dict[str, Any]:
    """Model inputs of a setting, with the same prompt in every sample.

    Args:
        model: The model.
        processor: Its processor.
        picture: The user's picture, or the frames of a clip, made smaller until it has `setting.tokens` visual tokens
            if they are given; or None for noise with about so many.
        question: The text; by default a plain question.
        setting: Number of samples, and of visual tokens of each.

    Raises:
        InputError: The processor rejects the prompt.
        MethodError: No size of the picture has so few tokens.
    """

    def made(shown: Any) -> dict[str, Any]:
        if isinstance(shown, Frames):
            single = loading.clip_prompt(model, processor, shown, question or QUESTION)
            return {name: torch.cat([value] * setting.batch) for name, value in single.items()}
        pictures = shown if isinstance(shown, list) else [shown]
        return _inputs(model, processor, pictures, question or QUESTION, setting.batch)

    if picture is None:
        return made(_pictures(model, processor, setting.tokens or 576))
    if setting.tokens is None:
        return made(picture)
    return dict(shrinking(model, processor, picture, made)(setting.tokens * setting.batch)[0])


def _inputs(model: Any, processor: Any, pictures: list[Image], question: str, batch: int) -> dict[str, Any]:
    if len(pictures) == 1 and batch == 1:
        made = loading.prompt(processor, pictures[0], question)
    else:
        try:
            made = processor(
                text=[_text(processor, len(pictures), question)] * batch,
                images=[pictures] * batch,
                return_tensors="pt",
                padding=batch > 1,
            )
        except Exception as error:  # processors raise any type of error
            what = f"{type(processor).__name__} cannot make a prompt of {len(pictures)} pictures"
            raise InputError(f"{what}: {one_line(error)}") from error
    return loading.in_dtype(model, made.to(model.device))


def _text(processor: Any, count: int, question: str) -> str:
    """Text of the prompt, with a placeholder for every picture."""
    if getattr(processor, "chat_template", None):
        content = [*({"type": "image"} for _ in range(count)), {"type": "text", "text": question}]
        return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return loading.plain_text(processor, count, question)


def _pictures(model: Any, processor: Any, tokens: int) -> list[Image]:
    """Noise pictures, as few as possible, that come closest to the requested number of visual tokens."""
    from PIL import Image

    parts = inspect(model)
    generator = torch.Generator().manual_seed(0)
    best: tuple[int, int, int] | None = None
    for side in SIDES:
        pixels = torch.randint(0, 256, (side, side, 3), generator=generator, dtype=torch.uint8)
        image = Image.fromarray(pixels.numpy())
        each = int(parts.is_placeholder(loading.prompt(processor, image, QUESTION)["input_ids"]).sum())
        if each == 0:
            continue
        count = min(MOST_PICTURES, max(1, round(tokens / each)))
        found = (abs(count * each - tokens), count, side)
        if best is None or found < best:
            best, chosen = found, image
    if best is None:
        raise InputError(
            f"{type(processor).__name__} puts no image placeholder into a prompt; expected a processor of images"
        )
    return [chosen] * best[1]
