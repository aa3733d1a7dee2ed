# SPDX-License-Identifier: Apache-2.0
"""Finds the parts of a vision tower by structure, and refuses towers that cannot be cut."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

from ..errors import UnsupportedModelError
from ..models.anatomy import Anatomy
from ..models.transformers_names import layer_configs
from ..report.tower import weights_per_token
from ..vision.patch_sizes import PatchSizes

_ATTENTION = re.compile("attn|attention", re.IGNORECASE)
_OWN_DISTANCES = re.compile("rel_pos|relative_position")


@dataclass(eq=False)
class TowerParts(PatchSizes):
    """The parts and sizes of a vision tower that a cut needs.

    Attributes:
        blocks: Its blocks, in order.
        weights: Multiply-adds of one token in the weight matrices of each block.
        embedding_weights: Multiply-adds of one patch in the patch embedding.
        merger_weights: Multiply-adds of one merged token in the rest of the tower outside its blocks.
    """

    blocks: nn.ModuleList
    weights: tuple[int, ...]
    embedding_weights: int
    merger_weights: int


def find_parts(anatomy: Anatomy) -> TowerParts:
    """Finds the blocks of the vision tower and how its patches are merged.

    Raises:
        UnsupportedModelError: The tower is not one list of attention blocks over one sequence of tokens.
    """
    sizes = PatchSizes.of(anatomy)
    blocks = _find_blocks(sizes.tower)
    _refuse_second_tower(anatomy)
    inside = {id(p) for p in blocks.parameters()}
    outside = [(m, p) for m in sizes.tower.modules() for p in m.parameters(recurse=False) if id(p) not in inside]
    return TowerParts(
        **vars(sizes),
        blocks=blocks,
        weights=tuple(map(weights_per_token, blocks, layer_configs(sizes.config, len(blocks)))),
        embedding_weights=sum(p.numel() for m, p in outside if isinstance(m, (nn.Conv2d, nn.Conv3d)) and p.dim() > 2),
        merger_weights=sum(p.numel() for m, p in outside if isinstance(m, nn.Linear) and p.dim() == 2),
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
