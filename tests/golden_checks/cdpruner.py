# SPDX-License-Identifier: Apache-2.0
"""Golden check of CDPruner: relevance over one or several crops, greedy order and gains."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn.functional import normalize

from vtprune.methods.cdpruner import scale, similarity
from vtprune_kernels import dpp_map

from .golden_files import cases, close


def check(data: dict[str, np.ndarray]) -> None:
    for _, case in cases(data):
        shape = case["relevance"].shape  # [N] or [crops, N]
        features = torch.from_numpy(case["features"]).reshape(-1, case["features"].shape[-1])
        images = torch.from_numpy(case["image_embeds"])
        found = -similarity(images, torch.from_numpy(case["text_embeds"])).flatten()  # in CLIP's space
        found = scale(
            found, torch.zeros(len(found), dtype=torch.int64), 1
        )  # the crops of a call share one minimum and maximum
        np.testing.assert_allclose(found.reshape(shape), case["relevance"], rtol=1e-4, atol=1e-5)
        relevance, budget = torch.from_numpy(case["relevance"]).flatten(), int(case["budget"])
        offsets = torch.arange(0, len(relevance) + 1, shape[-1])
        for scores in (found, relevance):
            order = dpp_map(features, scores, offsets, torch.full((len(offsets) - 1,), budget)) - offsets[:-1, None]
            np.testing.assert_array_equal(order.reshape(case["kept"].shape), case["kept_in_order"])
            np.testing.assert_array_equal(order.sort(1).values.reshape(case["kept"].shape), case["kept"])
        gains = [pick_gains(features, relevance, rows) for rows in order + offsets[:-1, None]]
        close(torch.stack(gains), case["pick_gains"])


def pick_gains(features: torch.Tensor, relevance: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Gain of each pick: the squared diagonal of the Cholesky factor of the kernel in pick order."""
    rows = (normalize(features, dim=-1) * relevance[:, None])[order].double()
    return torch.linalg.cholesky(rows @ rows.T).diagonal().square().float()
