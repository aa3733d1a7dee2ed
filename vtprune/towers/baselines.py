# SPDX-License-Identifier: Apache-2.0
"""Baseline tower methods: random and evenly spaced patches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.options import Seed
from ..core.ragged import seeded_scores
from ..core.spread import spread, spread_grid
from .method import Patches, TowerChoice, TowerMethod


@dataclass
class Random(TowerMethod):
    """Keeps a random subset of every picture, drawn uniformly; dropped patches keep their states at the cut.

    A baseline without a paper. Every picture has a generator of its own with the same seed, so that it keeps the same
    patches alone and in a batch.

    Attributes:
        seed: Seed of the generators, which are on the CPU.
    """

    seed: Seed = 0

    def score(self, patches: Patches) -> Tensor:
        return seeded_scores(patches.unit_offsets, self.seed).to(patches.states.device)


@dataclass
class Uniform(TowerMethod):
    """Keeps an evenly spaced subset of every picture; dropped patches keep their states at the cut.

    A baseline without a paper, similar to a coarser grid. The budget of a clip is split evenly over its frames.
    Pictures without a known grid are subsampled in the order of their patches.
    """

    def choose(self, patches: Patches) -> TowerChoice:
        assert patches.budgets is not None
        keep = torch.zeros(int(patches.unit_offsets[-1]), dtype=torch.bool)
        for number, (start, budget) in enumerate(
            zip(patches.unit_offsets[:-1].tolist(), patches.budgets.tolist(), strict=True)
        ):
            grid, count = patches.grids[number], int(patches.unit_offsets[number + 1]) - start
            if grid is None:
                keep[start : start + count] = spread(torch.ones(count, dtype=torch.int64), budget) > 0
                continue
            frames, per_frame = grid.frames, count // grid.frames
            shares = spread(torch.full((frames,), per_frame), budget).tolist()
            order = grid.units()
            rows = torch.arange(grid.rows // grid.merge).repeat_interleave(grid.cols // grid.merge)
            for frame, share in enumerate(shares):
                marked = spread_grid(rows, share) if share else torch.zeros(per_frame, dtype=torch.bool)
                keep[start + order[frame * per_frame : (frame + 1) * per_frame][marked]] = True
        return TowerChoice(keep.to(patches.states.device)[patches.unit])
