# SPDX-License-Identifier: Apache-2.0
"""Finds the parts of a vision tower by structure, and refuses towers that cannot be cut."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import UnsupportedModelError
from ..models.anatomy import Anatomy
from ..report.tower import weights_per_token

_ATTENTION = re.compile("attn|attention", re.IGNORECASE)
_OWN_DISTANCES = re.compile("rel_pos|relative_position")
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
class TowerParts:
    """The parts and sizes of a vision tower that a cut needs.

    Attributes:
        tower: The vision tower.
        blocks: Its blocks, in order.
        config: The tower's config, or the composite's if it has none.
        merge: Side of the square of patches that the projector merges into one token; 1 if it does not merge.
        packed_merge: Side of the squares by which patches are ordered in a packed sequence; 1 for raster order.
        tokens: Projected tokens per picture if the config fixes them instead of a merge size, else None.
        patch: Height and width of a patch in pixels.
        weights: Multiply-adds of one token in the weight matrices of each block.
        embedding_weights: Multiply-adds of one patch in the patch embedding.
        merger_weights: Multiply-adds of one merged token in the rest of the tower outside its blocks.
        merges_by_convolution: Whether a convolution of the tower merges patches, which needs them in raster order.
    """

    tower: nn.Module
    blocks: nn.ModuleList
    config: Any
    merge: int
    packed_merge: int
    tokens: int | None
    patch: tuple[int, int]
    weights: tuple[int, ...]
    embedding_weights: int
    merger_weights: int
    merges_by_convolution: bool = False


def find_parts(anatomy: Anatomy) -> TowerParts:
    """Finds the blocks of the vision tower and how its patches are merged.

    Raises:
        UnsupportedModelError: The tower is not one list of attention blocks over one sequence of tokens.
    """
    tower = anatomy.vision_tower
    blocks = _find_blocks(tower)
    _refuse_second_tower(anatomy)
    config = getattr(tower, "config", None) or anatomy.config
    homes = [config, getattr(anatomy.config, "vision_config", None), anatomy.config]
    homes = [home for home in homes if home is not None]
    inside = {id(p) for p in blocks.parameters()}
    outside = [(m, p) for m in tower.modules() for p in m.parameters(recurse=False) if id(p) not in inside]
    convolutions = sum(p.numel() for m, p in outside if isinstance(m, (nn.Conv2d, nn.Conv3d)) and p.dim() > 2)
    linear = sum(p.numel() for m, p in outside if isinstance(m, nn.Linear) and p.dim() == 2)
    merge = next((m for home in homes if (m := _merge_of(home))), 1)
    return TowerParts(
        tower,
        blocks,
        config,
        merge=merge,
        packed_merge=_side(getattr(config, "spatial_merge_size", None)) or 1,
        tokens=next((n for home in homes if (n := getattr(home, "mm_tokens_per_image", None))), None),
        patch=next((p for home in homes if (p := _patch_of(home))), (1, 1)),
        weights=tuple(weights_per_token(block, config) for block in blocks),
        embedding_weights=convolutions,
        merger_weights=linear,
        merges_by_convolution=any(
            isinstance(m, nn.Conv2d) and m.in_channels > 4 and m.stride[0] == merge > 1 for m, _ in outside
        ),
    )


def _find_blocks(tower: nn.Module) -> nn.ModuleList:
    name = type(tower).__name__
    lists = [
        (path, module)
        for path, module in tower.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 1 and any(map(_attends, module))
    ]
    if not lists:
        raise UnsupportedModelError(
            f"the vision tower {name} cannot be cut: expected a list of blocks that attend over one sequence of "
            "patches, found none (convolutions, or a single projection); patch without tower="
        )
    inner = [path for path, _ in lists if any(path.startswith(other + ".") for other, _ in lists if other != path)]
    if inner:
        raise UnsupportedModelError(
            f"the vision tower {name} cannot be cut: its blocks are in stages ({inner[0]}) with pooling or shifted "
            "windows between them, so a patch is not the same row in all blocks; patch without tower="
        )
    if len(lists) > 1:
        raise UnsupportedModelError(
            f"the vision tower {name} cannot be cut: it consists of {len(lists)} towers "
            f"({', '.join(path for path, _ in lists)}), and the mapping of patches between them is unknown; patch "
            "without tower="
        )
    path, blocks = lists[0]
    others = [block for block in blocks if not _attends(block)]
    if others:
        raise UnsupportedModelError(
            f"the vision tower {name} cannot be cut: {len(others)} of its {len(blocks)} blocks have no attention "
            f"({', '.join(n for n, _ in others[0].named_children())}) and may mix patches in a way that needs all of "
            "them; patch without tower="
        )
    for child, module in blocks.named_modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and any(k > 1 for k in module.kernel_size):
            raise UnsupportedModelError(
                f"the vision tower {name} cannot be cut: its blocks mix neighboring patches by a convolution "
                f"({path}.{child}), which needs all of them; patch without tower="
            )
    for child, _ in blocks.named_parameters():
        if _OWN_DISTANCES.search(child):
            raise UnsupportedModelError(
                f"the vision tower {name} cannot be cut: its blocks use relative positions on the full grid of patches "
                f"({path}.{child}); patch without tower="
            )
    return blocks


def _refuse_second_tower(anatomy: Anatomy) -> None:
    """Refuses models with several towers, such as one for pictures and one for clips, or one for each resolution."""
    known = set(anatomy.vision_tower.modules()) | set(anatomy.decoder.modules())
    for name, module in anatomy.composite.named_modules():
        if module in known or any(m in known for m in module.modules()) or not hasattr(module, "post_init"):
            continue
        takes = "pixel" in str(getattr(module, "main_input_name", ""))
        if takes and any(isinstance(m, nn.ModuleList) and len(m) > 1 and _attends(m) for m in module.modules()):
            raise UnsupportedModelError(
                f"{type(anatomy.composite).__name__} has a second vision tower ({name}) besides "
                f"{type(anatomy.vision_tower).__name__}; tower= supports models with one; patch without tower="
            )


def _attends(block: nn.Module) -> bool:
    return any(_ATTENTION.search(name.rpartition(".")[2]) for name, _ in block.named_modules())


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
