# SPDX-License-Identifier: Apache-2.0
"""The vision tower in a prefill's record: kept patches, and the cost of the tower relative to the decoder."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

_EXPERTS = re.compile(r"(^|\.)experts(\.|$)")


def weights_per_token(module: nn.Module, config: Any = None) -> int:
    """Multiply-adds of one token in the weight matrices of a module.

    Embedding tables are left out; of experts, only those that a token is routed to count.

    Args:
        module: A block, a layer or a projector.
        config: Config with the number of experts and of experts per token.
    """
    tables = {id(p) for m in module.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    routed_names = ("num_experts_per_tok", "moe_topk", "top_k_experts")
    routed = next((n for k in routed_names if (n := getattr(config, k, None))), 1)
    names = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
    experts = next((n for k in names if (n := getattr(config, k, None))), 1)
    share = routed / experts if isinstance(routed, int) and isinstance(experts, int) else 1.0
    total = 0.0
    for name, parameter in module.named_parameters():
        if parameter.dim() >= 2 and id(parameter) not in tables:
            total += parameter.numel() * (share if _EXPERTS.search(name) else 1.0)
    return round(total)


@dataclass
class BlockWork:
    """Work of one block of the tower; evaluated on demand, so that the forward does not synchronize with the device.

    Attributes:
        weights: Multiply-adds of one token in its weight matrices.
        width: Width of the states.
        batch, length: Shape `[B, L]` of the states without a cut.
        candidates: Integer vectors among the block's arguments, one of which may be `cu_seqlens`, the offsets of groups
            that attend to each other.
        tokens_after: Number of tokens that ran.
        pairs_after: Pairs of them that attend to each other; None without a cut.
    """

    weights: int
    width: int
    batch: int
    length: int
    candidates: list[Tensor]
    tokens_after: int
    pairs_after: int | None = None

    @cached_property
    def pairs(self) -> int:
        """Pairs of tokens that attend to each other without a cut."""
        for candidate in self.candidates:
            ends = candidate.cpu().long()
            if len(ends) > 1 and int(ends[0]) == 0 and int(ends[-1]) == self.length and bool((ends.diff() >= 0).all()):
                return int(ends.diff().square().sum())
        return self.batch * self.length**2

    @property
    def flops(self) -> tuple[float, float]:
        """Multiply-adds without the cut and with it."""
        before = self.batch * self.length * self.weights + 2 * self.pairs * self.width
        after = self.pairs if self.pairs_after is None else self.pairs_after
        return before, self.tokens_after * self.weights + 2 * after * self.width


@dataclass
class TowerRun:
    """One call of the vision tower.

    Attributes:
        method: Name of the tower method; "" if the tower was not cut.
        block: The cut was before this block; the number of blocks if there was none.
        kept: For each image (tile, clip), the numbers of the patches that ran in the blocks from there on, in the
            tower's order, class tokens not counted; empty if the tower was not cut.
        patches: Number of patches of each image; likewise.
        work: Work of every block.
        outside: Multiply-adds of the tower outside its blocks: patch embedding and merger.
        spared: Those of them that the merger was spared, because dropped patches are copies of kept ones.
        selection_time: Host seconds spent on the selection.
    """

    method: str
    block: int
    kept: list[Tensor]
    patches: list[int]
    work: list[BlockWork] = field(repr=False)
    outside: float = 0.0
    spared: float = 0.0
    selection_time: float = 0.0

    @property
    def flops(self) -> tuple[float, float]:
        """Multiply-adds of the tower without the cut and with it."""
        both = [work.flops for work in self.work]
        return sum(b for b, _ in both) + self.outside, sum(a for _, a in both) + self.outside - self.spared


@dataclass(frozen=True)
class Work:
    """Cost of a token in projector and decoder.

    Attributes:
        layers: Multiply-adds of one token in the weight matrices of each decoder layer.
        width: Width of the decoder's states.
        projector: Multiply-adds of one visual token in the projector; 0 if it is part of the tower.
    """

    layers: tuple[int, ...]
    width: int
    projector: int

    def decoder(self, tokens: Sequence[int]) -> float:
        """Multiply-adds of the decoder, with causal attention, for the given number of tokens at each layer's input."""
        return sum(n * weights + n * n * self.width for n, weights in zip(tokens, self.layers, strict=True))


@dataclass
class TowerPruning:
    """`patch.last.tower`: costs and kept patches of the vision tower in the most recent prefill.

    Attributes:
        runs: Calls of the tower, in order.
        rest: Multiply-adds of projector and decoder, text included, without pruning and with it.
    """

    runs: list[TowerRun]
    rest: tuple[float, float]

    @property
    def kept(self) -> list[Tensor]:
        """For each image, the numbers of the patches that ran after the cut; tiles and clips count as images."""
        return [kept for run in self.runs for kept in run.kept]

    @property
    def patches(self) -> list[int]:
        """Number of patches of each image."""
        return [count for run in self.runs for count in run.patches]

    @property
    def flops(self) -> tuple[float, float]:
        """Multiply-adds of the tower without the cut and with it."""
        both = [run.flops for run in self.runs]
        return sum(b for b, _ in both), sum(a for _, a in both)

    @property
    def selection_time(self) -> float:
        """Host seconds spent on selecting patches."""
        return sum(run.selection_time for run in self.runs)

    @property
    def first_token(self) -> tuple[float, float]:
        """Multiply-adds up to the first generated token without any pruning and with it, tower included."""
        return self.flops[0] + self.rest[0], self.flops[1] + self.rest[1]

    @property
    def share(self) -> tuple[float, float]:
        """The tower's share of the multiply-adds of the first token without any pruning, and as it ran."""
        (before, after), (whole, left) = self.flops, self.first_token
        return before / whole, after / left

    @property
    def bound(self) -> float:
        """Largest possible reduction factor of `first_token` by pruning the decoder alone, with the tower as it ran."""
        return (self.flops[1] + self.rest[0]) / self.flops[1]

    def to_dict(self) -> dict:
        """The numbers of the report as JSON values."""
        (before, after), (share, share_after) = self.flops, self.share
        return {
            "cuts": [f"{run.method} before block {run.block}" for run in self.runs if run.method],
            "patches": self.patches,
            "kept": [len(kept) for kept in self.kept],
            "flops": before,
            "flops_after": after,
            "first_token": self.first_token[0],
            "first_token_after": self.first_token[1],
            "share": share,
            "share_after": share_after,
            "bound": self.bound,
            "selection_time": self.selection_time,
        }


def kept_numbers(keep: Sequence[Tensor]) -> list[Tensor]:
    """Numbers of the kept patches of each image, from keep masks."""
    return [mask.nonzero()[:, 0].to(torch.int64) for mask in keep]
