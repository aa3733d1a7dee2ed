# SPDX-License-Identifier: Apache-2.0
"""Copies between the host and a device, with as few waits as possible.

The host runs ahead of a device by launching work that the device has not come to yet. Whatever waits for the device
gives that lead away, so indices go there without waiting, and all that a cut needs to know comes back at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`; a copy from the host does not wait for what the device is doing.

    Such a copy has left the tensor's own memory when the call returns: the driver stages memory that is not pinned.
    """
    return tensor.to(device, non_blocking=tensor.device.type == "cpu")


@dataclass
class DeferredChecks:
    """What has to hold for a choice to mean anything, found out on the device and read together with the choice.

    Attributes:
        flags: 0-d bool tensors, True where all is well.
        refusals: What raises the error of a flag that is False.
    """

    flags: list[Tensor] = field(default_factory=list)
    refusals: list[Callable[[], None]] = field(default_factory=list)

    def add(self, flag: Tensor, refuse: Callable[[], None]) -> None:
        self.flags.append(flag)
        self.refusals.append(refuse)

    def raise_if_failed(self, *results: Tensor) -> list[Tensor]:
        """Reads the flags, and `results` `[M]` along with them in a single copy where they share a device.

        Args:
            results: 1-d tensors whose values float32 holds.

        Returns:
            list[Tensor]: `results` on the CPU, in their dtypes.
        """
        asked = [*self.flags, *results]
        devices = {tensor.device.type for tensor in asked}
        if devices == {"cpu"}:
            read = [*self.flags, *(tensor.detach().clone() for tensor in results)]
        elif len({tensor.device for tensor in asked}) == 1:
            parts = torch.cat([tensor.detach().reshape(-1).float() for tensor in asked]).cpu()
            read = [part.to(x.dtype) for part, x in zip(parts.split([x.numel() for x in asked]), asked, strict=True)]
        else:
            read = [tensor.detach().cpu() for tensor in asked]
        count, refusals = len(self.flags), self.refusals
        self.flags, self.refusals = [], []
        for fine, refuse in zip(read[:count], refusals, strict=True):
            if not bool(fine):
                refuse()
        return [part.reshape(x.shape) for part, x in zip(read[count:], results, strict=True)]
