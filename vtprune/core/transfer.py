# SPDX-License-Identifier: Apache-2.0
"""Copies between host and device, with as few synchronizations as possible.

The host queues kernels ahead of the device, and loses this lead whenever it waits for a result. Therefore indices are
copied to the device without waiting, and everything that a cut needs on the host is read back in one copy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies `tensor` to `device`; copies from the host do not wait for the device's queue.

    `tensor` may be overwritten afterwards, because the driver stages memory that is not pinned.
    """
    return tensor.to(device, non_blocking=tensor.device.type == "cpu")


def all_finite(x: Tensor) -> Tensor:
    """Whether no value is NaN or Inf, as a 0-d bool tensor on the device of `x`."""
    # torch.isfinite makes four tensors of the size of `x`; NaN and Inf both pass through the maximum.
    return x.abs().amax() < torch.inf if x.numel() else x.new_ones((), dtype=torch.bool)


@dataclass
class DeferredChecks:
    """Device-side checks, read back together with the selection.

    Attributes:
        flags: 0-d bool tensors, False for a check that failed.
        on_failure: For each flag, the function that raises its error.
    """

    flags: list[Tensor] = field(default_factory=list)
    on_failure: list[Callable[[], None]] = field(default_factory=list)

    def add(self, flag: Tensor, on_failure: Callable[[], None]) -> None:
        self.flags.append(flag)
        self.on_failure.append(on_failure)

    def raise_if_failed(self, *results: Tensor) -> list[Tensor]:
        """Reads the flags and `results` back, in a single copy if they share a device, and raises for a failed check.

        Args:
            results: 1-d tensors whose values float32 represents exactly.

        Returns:
            list[Tensor]: `results` on the CPU, in their dtypes.
        """
        tensors = [*self.flags, *results]
        devices = {tensor.device.type for tensor in tensors}
        if devices == {"cpu"}:
            read = [*self.flags, *(tensor.detach().clone() for tensor in results)]
        elif len({tensor.device for tensor in tensors}) == 1:
            parts = torch.cat([tensor.detach().reshape(-1).float() for tensor in tensors]).cpu()
            sizes = [x.numel() for x in tensors]
            read = [part.to(x.dtype) for part, x in zip(parts.split(sizes), tensors, strict=True)]
        else:
            read = [tensor.detach().cpu() for tensor in tensors]
        count, on_failure = len(self.flags), self.on_failure
        self.flags, self.on_failure = [], []
        for passed, fail in zip(read[:count], on_failure, strict=True):
            if not bool(passed):
                fail()
        return [part.reshape(x.shape) for part, x in zip(read[count:], results, strict=True)]
