# SPDX-License-Identifier: Apache-2.0
"""Tower method that keeps the patches with the most attention."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .method import Patches, TowerMethod


@dataclass
class Attention(TowerMethod):
    """Keeps the patches that receive the most attention; the others keep their states at the cut.

    The score of a patch is the attention that it receives, averaged over heads and over the tokens of its picture
    (including class tokens), in the last block with full attention before the cut (in the block at the cut if there is
    none). Queries and keys are computed again for it; no attention map is stored. In pictures of 2,048 patches or more,
    512 tokens stand for all: reading all of them takes longer than the cut saves.
    """

    def score(self, patches: Patches) -> Tensor:
        return patches.received()
