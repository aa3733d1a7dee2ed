# SPDX-License-Identifier: Apache-2.0
"""Helpers of the golden checks: cases of a file, clips, inputs of a decoder layer, and comparisons."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from vtprune.core.clips import Clip
from vtprune.core.tokens import AttentionInputs


def cases(data: dict[str, np.ndarray]) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Yields the name and arrays of every group of a golden file."""
    groups = sorted({name.split("_")[0] for name in data})
    assert groups
    for group in groups:
        prefix = f"{group}_"
        yield group, {name.removeprefix(prefix): value for name, value in data.items() if name.startswith(prefix)}


def clip_of(case: dict[str, np.ndarray]) -> tuple[torch.Tensor, Clip]:
    """Features `[n, D]` and the clip of a case whose features are `[T, P, D]`."""
    features = torch.from_numpy(case["features"])
    return features.flatten(0, 1), Clip.of_grid(*features.shape[:2])


def attention_inputs(case: dict[str, np.ndarray], queries: torch.Tensor, keys: torch.Tensor) -> AttentionInputs:
    """Queries `[R, H, dh]` of the last `R` tokens, and keys `[S, H, dh]` of all, which stand for the values as well."""
    rows, length, start = len(queries), len(keys), int(case["image_start"])
    return AttentionInputs(
        queries=queries,
        query_offsets=torch.tensor([0, rows]),
        query_order=torch.arange(length - rows, length),
        keys=keys,
        values=keys,
        key_offsets=torch.tensor([0, length]),
        visual=torch.arange(start, start + int(case["num_image_tokens"])),
        scaling=keys.shape[-1] ** -0.5,
    )


def layer_inputs(case: dict[str, np.ndarray], rows: int) -> AttentionInputs:
    """Queries of the last `rows` tokens and all keys, from hidden states and weights of the next layer."""
    hidden, heads = torch.from_numpy(case["hidden"]), int(case["num_heads"])
    normed = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + 1e-5) * torch.from_numpy(case["norm_weight"])
    queries, keys = (
        _rotated((normed @ torch.from_numpy(case[name]).T).unflatten(-1, (heads, -1)))  # [S, H, dh]
        for name in ("q_weight", "k_weight")
    )
    return attention_inputs(case, queries[-rows:], keys)


def _rotated(x: torch.Tensor) -> torch.Tensor:
    """Half-split rotation of `[S, H, dh]` at positions 0..S-1."""
    half = x.shape[-1] // 2
    angle = torch.arange(len(x))[:, None] * 10000.0 ** (-torch.arange(half) / half)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def close(x: torch.Tensor, y: np.ndarray, extra: float = 0.0) -> None:
    """Scores and attention: |x-y| <= 1e-4*|y| + 1e-6*max|y| + extra."""
    np.testing.assert_allclose(x.numpy().reshape(y.shape), y, rtol=1e-4, atol=1e-6 * np.abs(y).max(initial=0) + extra)


def merged_close(x: torch.Tensor, y: np.ndarray) -> None:
    """Merged features: 1e-4 relative + 1e-5."""
    np.testing.assert_allclose(x.numpy(), y, rtol=1e-4, atol=1e-5)


def same_kept(keep: torch.Tensor, case: dict[str, np.ndarray]) -> None:
    """Asserts the kept tokens, and the count of each frame where the case has one."""
    kept = keep.sort().values
    assert kept.tolist() == case["kept"].tolist()
    if "frame_counts" in case:
        frames, places = case["features"].shape[:2]
        assert torch.bincount(kept // places, minlength=frames).tolist() == case["frame_counts"].tolist()
