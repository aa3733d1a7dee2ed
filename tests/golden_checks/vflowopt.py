# SPDX-License-Identifier: Apache-2.0
"""Golden check of VFlowOpt: importance map, assembly over tiles, recycling, cuts in the decoder."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

from vtprune.core.ragged import top_k
from vtprune.methods.vflowopt.grid_recycling import grid_cells, recycle
from vtprune.methods.vflowopt.importance_map import patch_entropy, selected_rows
from vtprune.models.any_resolution import tiles_per_image
from vtprune.vision.crops import arrangements
from vtprune.vision.tower import Attention

from .golden_files import cases, close, merged_close

SIDE = 27  # patches per side of a crop


def check(data: dict[str, np.ndarray]) -> None:
    for _, case in cases(data):
        if "queries" in case:
            check_map(case)
        elif "crop_importance" in case:
            check_recycling(case)
        else:
            check_cuts(case)


def check_map(case: dict[str, np.ndarray]) -> None:
    queries, keys = (torch.from_numpy(case[name])[None] for name in ("queries", "keys"))
    size, scaling = queries.shape[2], queries.shape[-1] ** -0.5
    close((scaling * queries @ keys.transpose(2, 3)).softmax(-1).mean(1)[0], case["attention_mean"])
    attention = Attention(queries, keys, scaling, None, None, 0)
    received = attention.received()
    close(received[0], case["received"])
    rows = selected_rows(received[0], torch.zeros(size, dtype=torch.int64), float(case["t"]))
    np.testing.assert_array_equal(rows.nonzero()[:, 0], case["selected_rows"])
    importance = attention.received(rows[None])[0]
    close(importance, case["importance"])
    pixels = torch.from_numpy(case["pixel_values"])[None]
    entropy = patch_entropy(pixels, round((pixels[0, 0].numel() / size) ** 0.5))
    close(entropy[0], case["patch_entropy"])
    close(importance + float(case["alpha"]) * entropy.softmax(1)[0], case["importance_alpha"])


def assembled(case: dict[str, np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """The map over thumbnail and tiles in the model's packed order, and the mask of newline tokens."""
    width, height = case["image_size"].tolist()
    crops = torch.from_numpy(case["crop_importance"])
    across, down = (len(crops) - 1, 1) if width > height else (1, len(crops) - 1)
    vision = SimpleNamespace(image_size=SIDE * 14, patch_size=14)
    config = SimpleNamespace(vision_config=vision, image_grid_pinpoints=[[SIDE * 14 * down, SIDE * 14 * across]])
    composite = Packing(config)
    inputs = {"pixel_values": crops, "image_sizes": torch.tensor([[height, width]])}
    tokens = SimpleNamespace(anatomy=SimpleNamespace(composite=composite, config=config), inputs=inputs)
    assert tiles_per_image(tokens.anatomy, tokens.inputs) == [len(crops)]
    packed = arrangements(tokens, [len(crops)])[0].apply(crops[..., None])[:, 0]
    newline = torch.zeros(len(case["importance"]), dtype=torch.bool)
    newline[SIDE * SIDE + int(case["local_width"]) - 1 :: int(case["local_width"])] = True
    return packed, newline


class Packing(LlavaOnevisionModel):
    """LLaVA-OneVision's packing of features, without its weights."""

    def __init__(self, config: SimpleNamespace) -> None:
        torch.nn.Module.__init__(self)
        self.config = config


def check_recycling(case: dict[str, np.ndarray]) -> None:
    importance, local = torch.from_numpy(case["importance"]), int(case["local_width"])
    packed, newline = assembled(case)
    close(packed, case["importance"][~newline.numpy()])
    assert (importance[newline] == 1).all()

    place = torch.arange(len(importance))
    crop = (place >= SIDE * SIDE).long()
    width = torch.where(crop == 0, SIDE, local)
    place = place - crop * SIDE * SIDE
    row, col = torch.where(newline, -1, place // width), torch.where(newline, -1, place % width)
    a, n = float(case["grid_a"]), len(importance)
    removed, extra = round(n * (1 - float(case["retention"]))), int(n / a**2)
    assert (removed, extra) == (int(case["num_removed_nominal"]), int(case["num_extra"]))
    marked = torch.zeros(n, dtype=torch.bool)
    marked[importance.sort(stable=True).indices[: removed + extra]] = True
    cell = grid_cells(row, col, crop, a)
    keep, merged, group, best = recycle(torch.from_numpy(case["features"]), importance, cell, marked)
    np.testing.assert_array_equal(group, case["group_id"])
    np.testing.assert_array_equal(best, case["group_representative"])
    np.testing.assert_array_equal(keep.nonzero()[:, 0], case["kept"])
    assert int(keep.sum()) == int(case["budget"])
    merged_close(merged[keep], case["merged_features"])
    close(importance[keep], case["importance_after"])


def check_cuts(case: dict[str, np.ndarray]) -> None:
    importance = torch.from_numpy(case["importance"])
    kept = torch.arange(len(importance))
    for number in (1, 2):
        n = len(kept)
        count = n - round(n * (1 - float(case[f"ratio_cut{number}"])))
        kept = kept[top_k(importance[kept], torch.tensor([0, n]), torch.tensor([count]))]
        np.testing.assert_array_equal(kept, case[f"kept_cut{number}"])
