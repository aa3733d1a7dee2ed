# SPDX-License-Identifier: Apache-2.0
"""Tiles of any-resolution models (LLaVA-NeXT, LLaVA-OneVision): their number and layout, by the model's own rules."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .anatomy import Anatomy


def tiles_per_image(anatomy: Anatomy, inputs: Mapping[str, Any]) -> list[int] | None:
    """Number of crops of each image, the downscaled whole image included; None for other models.

    Args:
        anatomy: Parts of the model.
        inputs: Keyword arguments of the call, with `image_sizes` and, where a sample may hold several images,
            `batch_num_images`.
    """
    composite, sizes = anatomy.composite, inputs.get("image_sizes")
    modules = [sys.modules[cls.__module__] for cls in type(composite).__mro__]
    count = next((f for module in modules if (f := getattr(module, "image_size_to_num_patches", None))), None)
    if count is None or sizes is None or not hasattr(composite, "pack_image_features"):
        return None
    images = inputs.get("batch_num_images")  # LLaVA-OneVision does not divide the images of a sample with several
    alone = [True] * len(sizes) if images is None else [int(n) == 1 for n in images for _ in range(int(n))]
    pinpoints, side = anatomy.config.image_grid_pinpoints, anatomy.config.vision_config.image_size
    return [
        int(count(size, pinpoints, side)) if single else 1
        for size, single in zip(torch.as_tensor(sizes).cpu(), alone, strict=True)
    ]


def pack(anatomy: Anatomy, tiles: Sequence[Tensor], sizes: Any, newline: Tensor | None, strategy: str) -> list[Tensor]:
    """Runs the model's `pack_image_features`, which lays out the tiles of every image.

    Args:
        anatomy: Parts of a model that has the method.
        tiles: For each image `[tiles, R, C]`.
        sizes: Original height and width of each image.
        newline: `[C]` value of newline tokens; None leaves them out.
        strategy: "full" if `tiles` include the class token.

    Returns:
        list: For each image `[n, C]`.
    """
    run: Any = anatomy.composite.pack_image_features
    # LLaVA-NeXT has to know whether the class token is there; OneVision has none, and shrinks large images.
    known = {
        "vision_feature_select_strategy": strategy,
        "vision_aspect_ratio": getattr(anatomy.config, "vision_aspect_ratio", None),
    }
    wanted = inspect.signature(run).parameters
    extra = {name: value for name, value in known.items() if name in wanted and value is not None}
    return list(run(list(tiles), sizes, image_newline=newline, **extra)[0])
