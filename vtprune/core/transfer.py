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
        sums: The sum of all tensors on each device; NaN and Inf pass through it, and the host reads one number.
        on_failure: For each tensor, the function that raises its error. Finite values may have an infinite sum, and so
            may other tensors: then it does not raise.
    """

    sums: dict[torch.device, Tensor] = field(default_factory=dict)
    on_failure: list[Callable[[], None]] = field(default_factory=list)

    def add(self, x: Tensor, on_failure: Callable[[], None]) -> None:
        total = (x.detach() if x.requires_grad else x).sum(dtype=torch.float32)
        self.sums[x.device] = self.sums[x.device] + total if x.device in self.sums else total
        self.on_failure.append(on_failure)

    def raise_if_failed(self, *results: Tensor) -> list[Tensor]:
        """Reads the sums and `results` back, in a single copy if they share a device, and raises for a failed check.

        Args:
            results: 1-d tensors whose values float32 represents exactly.

        Returns:
            list[Tensor]: `results` on the CPU, in their dtypes; those that were there already are not copied.
        """
        sums, on_failure = list(self.sums.values()), self.on_failure
        self.sums, self.on_failure = {}, []
        tensors = [*sums, *results]
        if all(tensor.device.type == "cpu" for tensor in tensors):
            read = [*sums, *(tensor.detach() for tensor in results)]
        elif len({tensor.device for tensor in tensors}) == 1:
            parts = torch.cat([tensor.detach().reshape(-1).float() for tensor in tensors]).cpu()
            sizes = [x.numel() for x in tensors]
            read = [part.to(x.dtype).reshape(x.shape) for part, x in zip(parts.split(sizes), tensors, strict=True)]
        else:
            read = [tensor.detach().cpu() for tensor in tensors]
        if not all(math.isfinite(total) for total in read[: len(sums)]):
            for fail in on_failure:
                fail()
        return read[len(sums) :]
