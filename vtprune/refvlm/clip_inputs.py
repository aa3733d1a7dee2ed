# SPDX-License-Identifier: Apache-2.0
"""Clips for the built-in Qwen2.5-VL: frames and a question, as the processor of a large one prepares a video file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image


def inputs(model: Any, processor: Any, frames: Sequence[Image], text: str) -> dict[str, Tensor]:
    """Keyword arguments of the model's call for one clip and the text after it.

    Args:
        model: Of the Qwen2.5-VL architecture.
        processor: Its processor. A stock one needs no video half (nor torchvision); a `PictureProcessor` that knows
            `<video>` also writes the marks around the clip.
        frames: RGB pictures of one size, an even number: two make one time step.
        text: What follows the clip in the prompt.
    """
    from .qwen import PictureProcessor

    if isinstance(processor, PictureProcessor) and processor.video_token_id is not None:
        return dict(processor(videos=[list(frames)], text=processor.video_token + text))
    vision = model.config.vision_config
    pictures = processor.image_processor(images=list(frames), return_tensors="pt")
    steps, (_, rows, columns) = len(frames) // vision.temporal_patch_size, pictures["image_grid_thw"][0].tolist()
    # A picture is prepared as a time step of two equal frames: one of them is taken from either picture of a pair.
    shape = (steps, 2, rows * columns, vision.in_channels, vision.temporal_patch_size, -1)
    pixels = pictures["pixel_values"].view(shape)  # [T, 2, h w, 3, 2, p p]
    pairs = torch.stack([pixels[:, 0, :, :, 0], pixels[:, 1, :, :, 1]], dim=3)  # [T, h w, 3, 2, p p]
    tokens = steps * rows * columns // vision.spatial_merge_size**2
    words = processor.tokenizer(text, return_tensors="pt")["input_ids"]
    ids = torch.cat([torch.full((1, tokens), model.config.video_token_id), words], dim=1)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": 2 * (ids == model.config.video_token_id).int(),  # 1 would be a picture
        "pixel_values_videos": pairs.flatten(2).flatten(0, 1),  # [T h w, 3 x 2 x p x p]
        "video_grid_thw": torch.tensor([[steps, rows, columns]]),
    }
