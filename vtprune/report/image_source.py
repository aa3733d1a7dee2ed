# SPDX-License-Identifier: Apache-2.0
"""Origin of a prefill's pictures: what is needed to draw its visual tokens over the originals afterwards.

Nothing is copied: pixels are referenced weakly (the patch keeps the last ones alive until the next encoding), and sizes
are small tensors of the caller.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..models.anatomy import Anatomy

_PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}
_SIZES = ("image_sizes", "batch_num_images")


def noted(inputs: dict[str, Any]) -> dict[str, Any]:
    """What a `Source` is made from: sizes, grids, and weak references to pixels."""
    kept = {name: value for name, value in inputs.items() if name in _SIZES or name.endswith("_grid_thw")}
    given = {name: inputs.get(name) for name in _PIXELS.values()}
    return kept | {name: weakref.ref(value) for name, value in given.items() if isinstance(value, Tensor)}


@dataclass
class Source:
    """Sizes and pixels of a call's pictures, as far as its arguments and the config tell.

    Attributes:
        kinds: Kinds of features in the order of `VisualTokens.kind`, such as "image" and "video".
        stretched: Kinds whose grid of tokens covers whole pictures (they were passed with `*_grid_thw`).
        sizes: `[images, 2]` heights and widths of the originals, for any-resolution models; else None.
        per_sample: Number of images in each sample, if it was passed; else None.
        pinpoints: Heights and widths that an any-resolution model may choose from; empty for others.
        side: Pixels along a square crop of the vision tower; 0 if unknown.
        patch: Pixels along a patch of the vision tower; 0 if unknown.
        pixels: Weak references to the pixels, by kind.
    """

    kinds: tuple[str, ...] = ("image",)
    stretched: frozenset[str] = frozenset()
    sizes: Tensor | None = None
    per_sample: list[int] | None = None
    pinpoints: list[list[int]] = field(default_factory=list)
    side: int = 0
    patch: int = 0
    pixels: dict[str, Callable[[], Tensor | None]] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, inputs: dict[str, Any], anatomy: Anatomy) -> Source:
        """Collects what a call's arguments tell about its pictures.

        Args:
            inputs: What is `noted` of the arguments of the composite's call and of its encoders.
            anatomy: Parts of the model.
        """
        kinds = tuple(anatomy.placeholders)
        config = anatomy.config
        vision = getattr(config, "vision_config", None)
        packs = hasattr(anatomy.composite, "pack_image_features")
        sizes, per_sample = inputs.get("image_sizes"), inputs.get("batch_num_images")
        return cls(
            kinds=kinds,
            stretched=frozenset(kind for kind in kinds if inputs.get(f"{kind}_grid_thw") is not None),
            sizes=torch.as_tensor(sizes) if packs and sizes is not None else None,
            per_sample=None if per_sample is None else [int(n) for n in per_sample],
            pinpoints=list(getattr(config, "image_grid_pinpoints", None) or []) if packs else [],
            side=_number(getattr(vision, "image_size", None)),
            patch=_number(getattr(vision, "patch_size", None)),
            pixels={kind: inputs[name] for kind, name in _PIXELS.items() if name in inputs},
        )

    def __getstate__(self) -> dict[str, Any]:
        """State without the pixels, which copies and pickles do not contain."""
        return {**vars(self), "pixels": {}}

    def crops(self, kind: str) -> Tensor | None:
        """Pixels of a kind, `[..., 3, H, W]` float32 on the CPU; None if they are gone or have another layout."""
        reference = self.pixels.get(kind)
        found = reference() if reference is not None else None
        if found is None or found.dim() not in (4, 5) or found.shape[-3] != 3:
            return None
        return found.detach().float().cpu()


def _number(value: Any) -> int:
    """The first of a pair, or the number itself; 0 for anything else."""
    value = value[0] if isinstance(value, (list, tuple)) and value else value
    return value if isinstance(value, int) else 0
