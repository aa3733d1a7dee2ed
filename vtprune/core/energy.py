# SPDX-License-Identifier: Apache-2.0
"""Automatic token counts: as many tokens of an image as explain a given share of its energy."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vtprune_kernels import residual_pivots
from vtprune_kernels.residual_pivots import residual_energy

from ..errors import BudgetError
from .files import FileError, read_json, write_text
from .options import Share, fits, shorten


@dataclass(frozen=True)
class Auto:
    """Automatic token count for each image: as many tokens as explain a share of the energy of all of them.

    The residual energy of an image's projected features falls as tokens are picked by residual selection
    (`methods.ResPrune`); the count is the first at which at most `1 - energy` of it is left. Any method can use it;
    those whose budget is for the whole sample get the sum over its images.

    Attributes:
        energy: Share to be explained, above 0 and below 1. `vtprune.study.auto.calibrate` finds the one that keeps a
            given mean share of the tokens of your images.
        min, max: Bounds of the share of an image's tokens that is kept, in [0, 1] and (0, 1]. Selection time grows with
            `max`.

    Raises:
        BudgetError: A share is out of range, or `min` is above `max`.
    """

    energy: float = 0.9
    min: float = 0.02
    max: float = 0.5

    def __post_init__(self) -> None:
        wrong = {"energy": (0, 1), "min": (), "max": (0,)}
        ranges = {"energy": "above 0 and below 1", "min": "from 0 to 1", "max": "above 0 and up to 1"}
        for name, expected in ranges.items():
            value = getattr(self, name)
            if not fits(value, Share) or value in wrong[name]:
                raise BudgetError(f"Auto.{name} is {shorten(value)}; expected a share {expected}")
        if self.min > self.max:
            raise BudgetError(f"Auto has min={self.min:g} and max={self.max:g}; expected min <= max")

    def __str__(self) -> str:
        return f"auto (energy {self.energy:g}, {self.min:g} to {self.max:g})"

    def counts(self, features: Tensor, offsets: Tensor) -> list[int]:
        """Number of tokens to keep of each image.

        Args:
            features: `[M, D]` float projected features; rows of zeros for tokens without a place.
            offsets: `[S + 1]` int64 offsets of the images.

        Returns:
            list[int]: One count for each of the `S` images.
        """
        left = energy_left(features, offsets, self.max)
        return [self.count(*pair) for pair in zip(left, offsets.diff().tolist(), strict=True)]

    def count(self, left: Tensor, size: int) -> int:
        """Number of tokens to keep of an image of `size`, from the energy left after its picks (`energy_left`)."""
        smallest, largest = bounds(size, self.min, self.max)
        needed = int((left[:largest] > 1 - self.energy).sum()) + 1  # `left` falls: the first that is low enough
        return min(max(needed, smallest), largest) if size else 0

    def save(self, path: str | Path, **about: object) -> None:
        """Writes the fields as JSON, together with the entries of `about`."""
        data = {"ratio": "auto", "energy": self.energy, "min": self.min, "max": self.max, "about": about}
        write_text(path, json.dumps(data, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Auto:
        """Reads a file written by `save`.

        Raises:
            BudgetError: The file is missing or has other content.
        """
        share = {"type": "number", "minimum": 0, "maximum": 1}
        numbers = dict.fromkeys(("energy", "min", "max"), share)
        properties = {**numbers, "ratio": {"const": "auto"}, "about": {"type": "object"}}
        schema = {"type": "object", "required": [*numbers], "properties": properties, "additionalProperties": False}
        try:
            data = read_json(path, schema)
            return cls(*(data[name] for name in numbers))
        except (FileError, BudgetError) as error:
            raise BudgetError(
                f"{path} is no file of an automatic ratio, as `vtprune tune --auto` writes: {error}"
            ) from error


def bounds(total: int, least: float, most: float) -> tuple[int, int]:
    """Smallest and largest count of `total` tokens for two shares, at least 1; the largest wins a conflict."""
    largest = max(1, math.floor(most * total + 1e-9))
    return min(max(1, math.ceil(least * total - 1e-9)), largest), largest


def energy_left(features: Tensor, offsets: Tensor, most: float = 1.0) -> list[Tensor]:
    """Share of each group's energy that is left after the first 1, 2, ... picks of residual selection.

    Args:
        features: `[M, D]`; rows of zeros (tokens without a place) have no energy.
        offsets: `[S + 1]` int64 offsets of the groups.
        most: Largest share of each group that is picked.

    Returns:
        list[Tensor]: `[k]` float32 on the CPU, k the largest count that `most` allows.
    """
    offsets = offsets.cpu()
    largest = torch.tensor([bounds(size, 0.0, most)[1] if size else 0 for size in offsets.diff().tolist()])
    order = residual_pivots(
        features, None, offsets, largest, int(largest.max()) if len(largest) else 0, int(offsets.diff().max())
    )
    left = residual_energy(features, order, offsets).cpu()
    return [row[:count] for row, count in zip(left, largest.tolist(), strict=True)]
