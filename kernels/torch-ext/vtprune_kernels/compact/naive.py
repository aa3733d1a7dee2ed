# SPDX-License-Identifier: Apache-2.0
"""Gathering of kept columns: the specification."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def compact(tensors: Sequence[Tensor], index: Tensor) -> list[Tensor]:
    """See `vtprune_kernels.compact`."""
    results = []
    for tensor in tensors:
        result = tensor.new_zeros(index.shape + tensor.shape[2:])
        for sample, columns in enumerate(index):
            for place, column in enumerate(columns.tolist()):
                if column >= 0:
                    result[sample, place] = tensor[sample, column]
        results.append(result)
    return results
