# SPDX-License-Identifier: Apache-2.0
"""Copies between host and device, with as few synchronizations as possible.

The host queues kernels ahead of the device, and loses this lead whenever it waits for a result. Therefore indices are
copied to the device without waiting, and everything that a cut needs on the host is read back in one copy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies `tensor` to `device`; copies from the host do not wait for the device's queue.

    `tensor` may be overwritten afterwards, because the driver stages memory that is not pinned.
    """
    return tensor.to(device, non_blocking=tensor.device.type == "cpu")


@dataclass
class DeferredChecks:
    """Device-side checks that tensors are finite, read back together with the selection.

    Attributes:
        sums: Sums of the tensors; NaN and Inf pass through them, in a single operation.
        on_failure: For each of them, the function that raises its error. Finite values may have an infinite sum: then
            it does not raise.
    """

    sums: list[Tensor] = field(default_factory=list)
    on_failure: list[Callable[[], None]] = field(default_factory=list)

    def add(self, x: Tensor, on_failure: Callable[[], None]) -> None:
        self.sums.append((x.detach() if x.requires_grad else x).sum(dtype=torch.float32))
        self.on_failure.append(on_failure)

    def raise_if_failed(self, *results: Tensor) -> list[Tensor]:
        """Reads the sums and `results` back, in a single copy if they share a device, and raises for a failed check.

        Args:
            results: 1-d tensors whose values float32 represents exactly.

        Returns:
            list[Tensor]: `results` on the CPU, in their dtypes; those that were there already are not copied.
        """
        tensors = [*self.sums, *results]
        if all(tensor.device.type == "cpu" for tensor in tensors):
            read = [*self.sums, *(tensor.detach() for tensor in results)]
        elif len({tensor.device for tensor in tensors}) == 1:
            parts = torch.cat([tensor.detach().reshape(-1).float() for tensor in tensors]).cpu()
            sizes = [x.numel() for x in tensors]
            read = [part.to(x.dtype).reshape(x.shape) for part, x in zip(parts.split(sizes), tensors, strict=True)]
        else:
            read = [tensor.detach().cpu() for tensor in tensors]
        count, on_failure = len(self.sums), self.on_failure
        self.sums, self.on_failure = [], []
        for total, fail in zip(read[:count], on_failure, strict=True):
            if not math.isfinite(total):
                fail()
        return read[count:]
