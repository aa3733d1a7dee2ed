# SPDX-License-Identifier: Apache-2.0
"""What heads on top of a decoder make of dropped columns.

A language model's head turns a column of zeros into logits that nobody reads. A head that returns a vector for every
column (ColPali, ColQwen2) would turn it into one that takes part in retrieval: such vectors become zero.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def without_dropped(output: Any, mask: Tensor) -> Any:
    """Zeroes the vectors of dropped columns in a model's output.

    Args:
        output: A transformers `ModelOutput`, or what else the model returned.
        mask: `[B, T]` bool on the CPU, True for columns that were kept.

    Returns:
        Any: The same object, changed, for outputs with fields that are called embeddings; others as they are.
    """
    for name in getattr(output, "keys", tuple)():
        value = output[name]
        fits = isinstance(value, Tensor) and value.dim() >= 3 and value.shape[:2] == mask.shape
        if fits and "embed" in name and name != "inputs_embeds":
            gone = (~mask).to(value.device)
            output[name] = torch.where(gone.view(*gone.shape, *[1] * (value.dim() - 2)), 0, value)
    return output
