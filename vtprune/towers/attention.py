# SPDX-License-Identifier: Apache-2.0
"""Patches that the others attend to most."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .method import Patches, TowerMethod


@dataclass
class Attention(TowerMethod):
    """Patches that receive the most attention stay; the others hold their states at the cut.

    The score of a patch is the attention that it receives, mean over heads and over the tokens of its picture (class
    tokens included), in the last block before the cut that sees whole pictures; in the block at the cut where no
    earlier one does. Queries and keys are computed once more for it; no attention map is stored.
    """

    def score(self, patches: Patches) -> Tensor:
        return patches.received()
