# SPDX-License-Identifier: Apache-2.0
"""Change of tokens in length and direction by a module (TransPrune, arXiv 2507.20630, section 3.2)."""

from __future__ import annotations

from torch import Tensor

from .._dispatch import on_gpu, triton_source
from .vectorized import transition_variation as _vectorized


def transition_variation(x_in: Tensor, x_out: Tensor) -> tuple[Tensor, Tensor]:
    """Change of length and of direction between a module's input and output.

    Args:
        x_in: `[..., D]` normalized input of the module.
        x_out: `[..., D]` its output before the residual addition.

    Returns:
        tuple[Tensor, Tensor]: `ratio = |out| / |in|` (no epsilon, as published) and `1 - cos(out, in)` (each length at
        least 1e-8), both `[...]` float32.
    """
    run = triton_source("transition_variation") if on_gpu(x_in) else _vectorized
    return run(x_in, x_out)


__all__ = ["transition_variation"]
