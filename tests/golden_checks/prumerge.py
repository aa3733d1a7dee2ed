# SPDX-License-Identifier: Apache-2.0
"""Golden check of PruMerge: class-token attention as one head, adaptive ratio, grid, neighbors, merged features."""

from __future__ import annotations

import numpy as np
import torch

from vtprune.methods.prumerge import grid_places, merge, neighbors, one_head, outlier_ratio
from vtprune.vision.tower import Attention

from .golden_files import cases, close, merged_close


def check(data: dict[str, np.ndarray]) -> None:
    for _, case in cases(data):
        keys, features = torch.from_numpy(case["keys"]), torch.from_numpy(case["features"])
        queries = torch.zeros_like(keys)
        queries[0] = torch.from_numpy(case["query_cls"])
        # Split into two heads, which the method has to concatenate again.
        heads = [x.unflatten(1, (2, -1)).transpose(0, 1)[None] for x in (queries, keys)]  # [1, 2, N + 1, C / 2]
        attention = one_head(Attention(*heads, 1.0, None, None, 1)).of_class_token()[0, 1:]
        close(attention, case["prumerge_cls_attention"])
        variants = sorted({name.split("_")[0] for name in case if name.endswith("_kept")})
        assert variants
        for variant in variants:
            part = {n.removeprefix(f"{variant}_"): v for n, v in case.items() if n.startswith(f"{variant}_")}
            check_variant(variant, part, attention, keys[1:], features)


def check_variant(
    variant: str, part: dict[str, np.ndarray], attention: torch.Tensor, keys: torch.Tensor, features: torch.Tensor
) -> None:
    ratio = float(part["ratio"])
    if variant != "fixed":
        assert outlier_ratio(attention) == ratio
    order = attention.sort(descending=True, stable=True).indices[: int(len(attention) * ratio)]
    if variant == "plus":
        grid = grid_places(len(attention), ratio)
        order = torch.cat([order, grid[~torch.isin(grid, order)]])
    assert len(order) == int(part["budget"])
    np.testing.assert_array_equal(order, part["kept_in_order"])
    np.testing.assert_array_equal(order.sort().values, part["kept"])
    near = neighbors(keys, order, part["merge_neighbours"].shape[1])
    np.testing.assert_array_equal(near, part["merge_neighbours"])
    merged = merge(features, attention, order, near)
    merged_close(merged, part["output_features"])
