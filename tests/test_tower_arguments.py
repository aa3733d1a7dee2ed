# SPDX-License-Identifier: Apache-2.0
"""Arguments of the blocks of a vision tower after rows were dropped."""

from __future__ import annotations

from typing import Any

import torch

from vtprune.towers.arguments import Rows, cut, cut_offsets
from vtprune.towers.change import nearest_kept
from vtprune.vision.block_calls import Offsets


def rows_of(length: int, kept: list[int]) -> Rows:
    unused: Any = None  # read by other functions only
    return Rows(1, length, torch.tensor([0]), torch.tensor([kept]), unused)


def test_windows_count_the_rows_that_are_left() -> None:
    offsets = torch.tensor([0, 4, 8, 10])
    assert cut_offsets(offsets, rows_of(10, [0, 3, 5, 9])).tolist() == [0, 2, 3, 4]


def test_windows_without_rows_drop_out() -> None:
    """Windows without kept rows are removed: packed attention accepts no empty window."""
    offsets = torch.tensor([0, 4, 8, 10])
    assert cut_offsets(offsets, rows_of(10, [1, 2, 8])).tolist() == [0, 2, 3]
    assert cut_offsets(offsets, rows_of(10, [4])).tolist() == [0, 1]


def test_rotations_lose_rows_only_where_a_picture_has_as_many_patches_as_channels() -> None:
    rows = Rows(1, 8, torch.tensor([0]), torch.tensor([[1, 2, 7]]), Offsets(1, 8))
    table, mask = torch.rand(8, 8), torch.rand(1, 1, 8, 8)
    named = {"position_embeddings": (table, table[None]), "bias": mask}
    kept = cut((torch.rand(8, 4),), named, rows, torch.rand(3, 4))[1]
    assert torch.equal(kept["position_embeddings"][0], table[[1, 2, 7]])
    assert torch.equal(kept["position_embeddings"][1], table[None, [1, 2, 7]])
    assert torch.equal(kept["bias"], mask[:, :, [1, 2, 7]][..., [1, 2, 7]])


def test_neighbors_are_nearest_although_a_channel_is_large_in_all_patches() -> None:
    """Some channels of a vision transformer's states are a hundred times as large as others, in all patches."""
    for seed in range(8):
        g = torch.Generator().manual_seed(seed)
        states = torch.randn(90, 24, generator=g) * 0.3
        states[:, 5] += 1000
        keep = torch.rand(90, generator=g) < 0.4
        dropped, sources = nearest_kept(states, keep, torch.tensor([0, 40, 90]), 3)
        for row, found in zip(dropped.tolist(), sources.tolist(), strict=True):
            same = torch.arange(90) < 40 if row < 40 else torch.arange(90) >= 40
            distance = (states.double() - states[row].double()).norm(dim=1).masked_fill(~(keep & same), torch.inf)
            assert sorted(found) == sorted(distance.topk(3, largest=False).indices.tolist())


def test_of_equally_near_patches_the_first_are_the_neighbors() -> None:
    """Flat areas: most patches of a picture are equal to many others."""
    for seed in range(8):
        g = torch.Generator().manual_seed(seed)
        states = torch.randn(6, 20, generator=g)[torch.randint(6, (200,), generator=g)]
        keep = torch.rand(200, generator=g) < 0.5
        dropped, sources = nearest_kept(states, keep, torch.tensor([0, 200]), 10)
        for row, found in zip(dropped.tolist(), sources.tolist(), strict=True):
            distance = (states - states[row]).norm(dim=1).masked_fill(~keep, torch.inf)
            assert found == distance.sort(stable=True).indices[:10].tolist()
