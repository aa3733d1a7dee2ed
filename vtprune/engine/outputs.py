# SPDX-License-Identifier: Apache-2.0
"""Outputs of heads on top of a pruned decoder.

The decoder returns zero states at dropped positions. A language model's head turns them into logits that nobody reads;
a head that returns an embedding for every token (ColPali, ColQwen2) would turn them into embeddings that take part in
retrieval. Those are set to zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def zero_dropped(output: Any, kept: Callable[[], Tensor]) -> Any:
    """Zeroes the embeddings of dropped tokens in a model's output.

    Args:
        output: The model's output; only a transformers `ModelOutput` is changed, whose fields have names.
        kept: Returns a mask `[B, T]` bool on the CPU, True for tokens that were kept.

    Returns:
        Any: The same object, with fields whose name contains "embed" changed in place.
    """
    for name in getattr(output, "keys", tuple)():
        if "embed" not in name or name == "inputs_embeds":
            continue
        value, mask = output[name], kept()
        if isinstance(value, Tensor) and value.dim() >= 3 and value.shape[:2] == mask.shape:
            gone = (~mask).to(value.device)
            output[name] = torch.where(gone.view(*gone.shape, *[1] * (value.dim() - 2)), 0, value)
    return output
