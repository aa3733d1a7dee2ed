# SPDX-License-Identifier: Apache-2.0
"""IWP: token pruning as implicit weight pruning, in the dual form of attention."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vtprune_kernels import progressive_mmr, rank1_relevance
from vtprune_kernels.progressive_mmr import closest_other

from ...core.method import Choice, Method, Stage
from ...core.options import AtLeastZero, Count, Positive, Share
from ...core.ragged import TIE, from_order, group_extreme, rank_in_group, settle_ties
from ...core.registry import register
from ...core.tokens import Tokens
from .query_free import query_free_magnitude

logger = logging.getLogger("vtprune")

# Relative difference up to which two relevances tie: float32 has logarithms around -10 to 1e-6 only.
_TIE = 2e-6


@dataclass
class Candidates:
    """Rows to choose from.

    Attributes:
        relevance: `[M]` float, higher is better; logarithms for the objective `"log"`.
        keys, values: `[M, G, dk]`, `[M, G, dv]`; the similarity of two rows is the cosine of their rank-one updates.
        scaling: Factor on the dot product of the attention.
        offsets: `[S + 1]` offsets of the groups.
    """

    relevance: Tensor
    keys: Tensor
    values: Tensor
    scaling: float
    offsets: Tensor


@register("iwp")
@dataclass
class IWP(Method):
    """Keeps the tokens whose key-value pairs change the output of attention most, without near-duplicates.

    Paper: arXiv 2604.00757, sections 3 and App. A. Softmax attention is a linear map built from one rank-one update
    `phi(k_i)^T v_i` per token. A token's relevance is the size of its update under the instruction's queries,
    `M_i = mean_{h,t} softmax_ti |v_i|`; two tokens duplicate each other by the cosine of their updates,
    `S_ij = mean_g cos(v_i, v_j) exp(-scaling |k_i - k_j|^2 / 2)`. Tokens are chosen by maximal marginal relevance,
    `r_i - duplication * max(0, max_{j chosen} S_ij)`. Keys and queries are read at the layer after the cut.

    No code was published. Choices of this implementation, where the paper says nothing: the layer, the mean over the
    instruction, the normalization of each head by its softmax sum, the mean over KV heads, and the size of the chunks.
    Of the layers 2 and 3 that the paper's timings allow, 3 keeps clearly more of the built-in model's answers; the
    weight of the duplication matters little there (`benchmarks/iwp_sweep.py`).

    Attributes:
        layer: The cut is before this decoder layer; a decoder with fewer layers is cut before its last one.
        duplication: Weight of duplication against relevance, in [0, 1]; 0 is top-k.
        chunk: Most tokens chosen per round, before similarities are updated; 1 is the exact greedy choice.
        growth: Tokens chosen per round as a share of those already chosen.
        pool_factor: Candidates per token chosen in a round; the choice among them is exact.
        query: `"instruction_mean"`, all text after the last visual token; `"last"`, the last token only (also where
            there is no such text); or `"none"`, each update's own size, for cuts made before the question is known.
        relevance: `r = M / max M`, min-max of `log M`, or the rank of `M`; `"log"` helps where one token dominates.
        reduce: How heads and query rows are joined: mean, root mean square or maximum.
        normalize: Softmax over all keys that the query sees, or over the visual ones.
        rope_in_magnitude: Whether queries and keys of the relevance are rotated: then it favors near positions.
        rope_in_duplication: Whether keys of the duplication are rotated: equal content far apart is then less alike.
        objective: `"log"` instead maximizes `log M + log(1 - duplication * S^2) / 2`, the part of each update outside
            the span of its closest chosen one; `relevance` is not used then.
    """

    question_aware: ClassVar[bool] = True

    layer: Count = 3
    duplication: Share = 0.5
    chunk: Positive = 16
    growth: AtLeastZero = 0.25
    pool_factor: Positive = 4
    query: Literal["instruction_mean", "last", "none"] = "instruction_mean"
    relevance: Literal["linear", "log", "rank"] = "linear"
    reduce: Literal["mean", "rms", "max"] = "mean"
    normalize: Literal["visible", "visual"] = "visible"
    rope_in_magnitude: bool = False
    rope_in_duplication: bool = True
    objective: Literal["linear", "log"] = "linear"

    def schedule(self, num_layers: int) -> tuple[Stage, ...]:
        return (Stage(min(self.layer, num_layers - 1)),)

    def candidates(self, tokens: Tokens) -> Candidates:
        """Relevance, keys and values of every visual token, read at the layer of the cut."""
        if self.query == "none":
            read = tokens.attention_inputs(rope=self.rope_in_duplication, queries="last")  # its queries are not used
            keys, values = read.keys[read.visual], read.values[read.visual]
            magnitude = query_free_magnitude(keys, values, tokens.offsets, read.scaling, self.reduce)
            relevance = self.scale(magnitude, tokens)
            return Candidates(relevance, keys, values, read.scaling, tokens.offsets)
        read = tokens.attention_inputs(rope=self.rope_in_magnitude, queries="last" if self.query == "last" else "text")
        places = (read.query_offsets, read.key_offsets, read.query_order, read.visual, read.scaling)
        settings = (self.reduce, self.normalize, read.softcap)
        magnitude = rank1_relevance(read.queries, read.keys, read.values, *places, *settings)
        if self.rope_in_duplication != self.rope_in_magnitude:
            read = tokens.attention_inputs(rope=self.rope_in_duplication, queries="last")  # only its keys are used
        relevance = self.scale(magnitude, tokens)
        return Candidates(relevance, read.keys[read.visual], read.values[read.visual], read.scaling, tokens.offsets)

    def scale(self, magnitude: Tensor, tokens: Tokens) -> Tensor:
        """`[M]` relevance from log-magnitudes `[M]`, scaled within each group as the objective needs it."""
        if self.objective == "log":
            return magnitude
        if self.relevance == "rank":
            last = (tokens.offsets.diff() - 1).clamp_min(1)[tokens.group]
            return 1 - rank_in_group(magnitude, tokens.offsets, tolerance=0) / last  # ranks of logarithms, as published
        top = group_extreme(magnitude, tokens.offsets, "amax")
        if self.relevance == "linear":
            return torch.nan_to_num(torch.exp(magnitude - top))
        low = group_extreme(magnitude, tokens.offsets, "amin")
        return torch.nan_to_num((magnitude - low) / (top - low), nan=1.0)  # all equal: relevance 1

    def choose(self, tokens: Tokens) -> Choice:
        rows = self.candidates(tokens)
        tolerance = TIE if self.objective == "log" else _TIE  # of logarithms, themselves about 10
        rows = replace(rows, relevance=settle_ties(rows.relevance, tokens.offsets, tolerance))
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug("iwp: %s", self.statistics(tokens, rows))
        order = self.order(rows, tokens.budgets, tokens.max_budget, tokens.max_length)
        return Choice(from_order(order, len(tokens)), scores=rows.relevance)

    def order(
        self, rows: Candidates, budgets: Tensor, max_budget: int | None = None, max_length: int | None = None
    ) -> Tensor:
        """Rows `[S, max_budget]` in the order of selection, padded with -1, by `vtprune_kernels.progressive_mmr`."""
        return progressive_mmr(
            rows.relevance,
            rows.keys,
            rows.values,
            rows.offsets,
            budgets,
            self.duplication,
            self.chunk,
            self.growth,
            self.pool_factor,
            self.objective,
            rows.scaling,
            max_budget=max_budget,
            max_length=max_length,
        )

    def statistics(self, tokens: Tokens, rows: Candidates | None = None) -> dict[str, float]:
        """Medians that show whether the terms of the objective are informative; costs `O(M^2)` time.

        A median relevance below 0.01 means that a few tokens dominate (prefer `relevance="log"`); a median similarity
        near 0 means that there are no duplicates and the choice is top-k (prefer `rope_in_duplication=False`).
        """
        rows = rows or self.candidates(tokens)
        closest = closest_other(rows.keys, rows.values, rows.offsets, rows.scaling)
        return {"relevance": float(rows.relevance.quantile(0.5)), "closest_similarity": float(closest.quantile(0.5))}
