# SPDX-License-Identifier: Apache-2.0
"""Tower method IPCV: keeps the patches that the last block changed most; the others follow their nearest neighbors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..core.options import Count, Positive
from ..core.ragged import first_equal
from .method import Patches, Rebuild, TowerChoice, TowerMethod

_CHUNK = 1 << 24  # distances in memory at a time


@dataclass
class Change(TowerMethod):
    """IPCV: keeps the patches whose state was changed most by the block before the cut.

    Paper: https://arxiv.org/abs/2512.18747. The score of a patch is `|h_block - h_(block-1)|`, the length of the change
    between the states entering the two blocks. After the cut, the state of a dropped patch `j` is
    `h_j^cut + mean over its neighbors n of (h_n^now - h_n^cut)`, where its neighbors are the nearest kept patches by
    Euclidean distance at the cut.

    Differences from the release: budget and neighbors are per picture (there all pictures of a call share one group);
    merge groups stay whole; blocks right after the cut attend to the kept patches only unless `stabilize` is set (the
    release lets 3 to 7 blocks attend to all rebuilt patches, which costs their attention in full).

    Attributes:
        neighbors: Number of kept patches that a dropped one follows.
        stabilize: Number of blocks after the cut that still run on all patches; dropped ones are rebuilt after each.
    """

    neighbors: Positive = 10
    stabilize: Count = 0  # type: ignore[misc]

    first_block: ClassVar[int] = 1

    def score(self, patches: Patches) -> Tensor:
        assert patches.before is not None
        return change(patches.before, patches.states)

    def choose(self, patches: Patches) -> TowerChoice:
        keep = patches.largest(self.score(patches))
        dropped, sources = nearest_kept(patches.states, keep, patches.offsets, self.neighbors)
        return TowerChoice(keep, Rebuild(dropped, sources, residual=True))


def change(before: Tensor, after: Tensor) -> Tensor:
    """Euclidean length `[N]` of the change between two states `[N, D]`, in float32."""
    return (after.float() - before.float()).norm(dim=-1)


def nearest(distance: Tensor, count: int) -> Tensor:
    """Columns `[R, count]` of the smallest distances of each row `[R, n]`, ascending; ties go to the smaller column."""
    values, columns = distance.topk(min(count + 1, distance.shape[1]), dim=1, largest=False)
    tied = (values[:, 1:] == values[:, :-1]).any(1)  # topk does not define the order of equals
    columns[tied] = distance[tied].sort(dim=1, stable=True).indices[:, : columns.shape[1]]
    return columns[:, :count]


def nearest_kept(states: Tensor, keep: Tensor, offsets: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The nearest kept patches of every dropped patch, within its picture.

    Args:
        states: `[N, D]`.
        keep: `[N]` bool; at least one of every picture.
        offsets: `[S + 1]` offsets of the pictures, on the host.
        count: Number of neighbors.

    Returns:
        tuple: `[R]` numbers of the dropped patches, and `[R, count]` those of their neighbors, nearest first, padded by
        -1 if a picture keeps fewer than `count`.
    """
    dropped_of, sources_of = [], []
    for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        kept = keep[start:end].nonzero()[:, 0] + start
        dropped = (~keep[start:end]).nonzero()[:, 0] + start
        # Distances do not depend on the mean, but a large one that all patches share would drown them in rounding.
        picture = states[start:end].float()
        picture = picture - picture.mean(0)
        points, size = picture[kept - start], min(count, len(kept))
        norms, first = points.square().sum(1), first_equal(points)
        found = []
        for part in dropped.split(max(1, _CHUNK // max(len(kept), 1))):
            # |a - b|^2 without |a|^2, which is the same for all candidates of a patch.
            distance = torch.addmm(norms, picture[part - start], points.t(), alpha=-2)
            found.append(nearest(distance[:, first], size))  # the same for equal patches
        sources = kept[torch.cat(found)] if found else kept.new_zeros(0, size)
        if size < count:
            sources = nn.functional.pad(sources, (0, count - size), value=-1)
        dropped_of.append(dropped)
        sources_of.append(sources)
    return torch.cat(dropped_of), torch.cat(sources_of)
