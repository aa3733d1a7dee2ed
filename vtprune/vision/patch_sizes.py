# SPDX-License-Identifier: Apache-2.0
"""Sizes of the patches of a vision tower, and of the squares that its projector merges."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from ..models.anatomy import Anatomy

# Names in configs for the side of the square of patches that becomes one projected token ...
_MERGES = (
    "spatial_merge_size",
    "merge_size",
    "merge_kernel_size",
    "downsample_factor",
    "scale_factor",
    "pooling_kernel_size",
    "hidden_stride",
)
_RATIOS = ("downsample_ratio", "pixel_shuffle_ratio")  # ... and for its inverse


@dataclass(eq=False)
class PatchSizes:
    """How a vision tower divides pictures.

    Attributes:
        tower: The vision tower.
        config: The tower's config, or what the composite's says of it.
        merge: Side of the square of patches that the projector merges into one token; 1 if it does not merge.
        packed_merge: Side of the squares by which patches are ordered in a packed sequence; 1 for raster order.
        tokens: Projected tokens per picture if the config fixes them instead of a merge size, else None.
        patch: Height and width of a patch in pixels.
        merges_by_convolution: Whether a convolution of the tower merges patches, which needs them in raster order.
    """

    tower: nn.Module
    config: Any
    merge: int
    packed_merge: int
    tokens: int | None
    patch: tuple[int, int]
    merges_by_convolution: bool

    @classmethod
    def of(cls, anatomy: Anatomy) -> PatchSizes:
        """Reads the sizes from the configs of a model."""
        tower = anatomy.vision_tower
        vision = getattr(anatomy.config, "vision_config", None)
        config = getattr(tower, "config", None) or vision or anatomy.config
        homes = [config, vision, anatomy.config]
        homes = [home for home in homes if home is not None]
        merge = next((m for home in homes if (m := _merge_of(home))), 1)
        return cls(
            tower,
            config,
            merge=merge,
            packed_merge=_side(getattr(config, "spatial_merge_size", None)) or 1,
            tokens=next((n for home in homes if (n := getattr(home, "mm_tokens_per_image", None))), None),
            patch=next((p for home in homes if (p := _patch_of(home))), (1, 1)),
            merges_by_convolution=any(
                isinstance(m, nn.Conv2d) and m.in_channels > 4 and m.stride[0] == merge > 1 for m in tower.modules()
            ),
        )


def _side(value: Any) -> int | None:
    value = value[0] if isinstance(value, (list, tuple)) and value else value
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 1 else None


def _merge_of(config: Any) -> int | None:
    sides = [_side(getattr(config, name, None)) for name in _MERGES]
    for name in _RATIOS:
        ratio = getattr(config, name, None)
        if isinstance(ratio, float) and 0 < ratio <= 1 and math.isclose(1 / ratio, round(1 / ratio)):
            sides.append(round(1 / ratio))
    return next((side for side in sides if side), None)


def _patch_of(config: Any) -> tuple[int, int] | None:
    value = getattr(config, "patch_size", None)
    if isinstance(value, int):
        return value, value
    return (value[-2], value[-1]) if isinstance(value, (list, tuple)) and len(value) >= 2 else None
