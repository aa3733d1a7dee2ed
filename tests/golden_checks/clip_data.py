# SPDX-License-Identifier: Apache-2.0
"""Helpers of the golden checks of clip methods: cases of a file, clips, and comparisons."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from vtprune.core.clips import Clip


def cases(data: dict[str, np.ndarray]) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Yields the name and arrays of every group of a golden file."""
    groups = sorted({name.split("_")[0] for name in data})
    assert groups
    for group in groups:
        yield (
            group,
            {name.removeprefix(f"{group}_"): value for name, value in data.items() if name.startswith(f"{group}_")},
        )


def clip_of(case: dict[str, np.ndarray]) -> tuple[torch.Tensor, Clip]:
    """Features `[n, D]` and the clip of a case whose features are `[T, P, D]`."""
    features = torch.from_numpy(case["features"])
    return features.flatten(0, 1), Clip.of_grid(*features.shape[:2])


def close(x: torch.Tensor, y: np.ndarray, extra: float = 0.0) -> None:
    """Scores: |x-y| <= 1e-4*|y| + 1e-6*max|y| + extra."""
    np.testing.assert_allclose(x.numpy().reshape(y.shape), y, rtol=1e-4, atol=1e-6 * np.abs(y).max() + extra)


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
