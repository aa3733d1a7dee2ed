# SPDX-License-Identifier: Apache-2.0
"""Copies of a sample that `generate` made for beams and returned sequences, before its pictures were encoded.

Newer transformers encodes pictures first and repeats their features, so that copies share rows of the encoder's
output. transformers 5.17 repeats the pixels and encodes every copy. `share` gives such copies the rows of the first,
so that they count as the one picture that they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .visual_tokens import VisualTokens

MAKER = "_expand_inputs_for_generation"  # transformers' method that repeats a prompt


def noting(expand: Callable, note: Callable[[int], None]) -> Callable:
    """Wraps a model's `MAKER` so that `note` is told how many copies of each sample it makes."""

    @functools.wraps(expand)
    def expanded(*args: Any, **kwargs: Any) -> Any:
        copies = kwargs.get("expand_size", args[0] if args else 1)
        note(copies if isinstance(copies, int) else 1)
        return expand(*args, **kwargs)

    return expanded


def share(visual: VisualTokens, copies: int, states: Any) -> bool:
    """Lets copies of a sample share rows of the encoder's output, in place.

    Args:
        visual: Every copy with rows of its own.
        copies: Of each sample, one after the other.
        states: `[B, T, D]` the decoder's input. Samples whose copies do not show the same are left as they are:
            transformers 5.17 gives the copies of a sample with several pictures one another's.

    Returns:
        bool: Whether all samples were copies of one another as said.
    """
    counts = torch.tensor(visual.counts)
    if copies < 2 or len(counts) % copies or not isinstance(states, Tensor):
        return False
    with torch.no_grad():
        groups = states.reshape(-1, copies, *states.shape[1:]).float()
        apart = (groups - groups[:, :1]).abs().flatten(1).amax(1) > 1e-2 * groups.abs().flatten(1).amax(1)
    same = ~apart.cpu() & (counts.view(-1, copies) == counts[::copies, None]).all(1)  # [B / copies]
    first = (counts.cumsum(0) - counts)[visual.sample - visual.sample % copies] + visual.index
    visual.feature = torch.where(
        same[visual.sample // copies], visual.feature[first.clamp_max(len(visual) - 1)], visual.feature
    )
    return bool(same.all())
