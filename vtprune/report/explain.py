# SPDX-License-Identifier: Apache-2.0
"""Explains why a visual token was kept or dropped: its score, its rank, and the most similar kept token.

The most similar token is only known for calls inside `recording()`, which copies the states of all visual tokens to the
CPU at every cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..errors import VTPruneError
from .record import PruningRecord

_recording: ContextVar[bool] = ContextVar("vtprune_recording", default=False)


@contextmanager
def recording() -> Iterator[None]:
    """Context in which prefills of this thread keep the states of their visual tokens for `Pruning.explain_token`."""
    before = _recording.set(True)
    try:
        yield
    finally:
        _recording.reset(before)


def wanted() -> bool:
    """Whether the current prefill keeps states."""
    return _recording.get()


@dataclass(frozen=True)
class TokenExplanation:
    """Score, rank and most similar kept token of one visual token at the cut that decided about it.

    Attributes:
        token: Its number among the visual tokens of the call.
        kept: Whether it is left after the last cut.
        layer: The layer before which it was dropped, or that of the last cut if it was kept; None without any cut.
        score: Its score at that cut; None for methods without scores.
        rank: 1 for the highest score; None without scores.
        rank_of: Number of tokens of its sample before that cut.
        duplicate: The other token kept there whose state has the largest cosine similarity; None without recorded
            states, or if no other was kept.
        similarity: Cosine similarity of the two states, in [-1, 1].
    """

    token: int
    kept: bool
    layer: int | None
    score: float | None
    rank: int | None
    rank_of: int
    duplicate: int | None = None
    similarity: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields as a dictionary."""
        return asdict(self)


def explain_token(pruning: PruningRecord, token: int) -> TokenExplanation:
    """Explains one token, see `TokenExplanation`.

    Raises:
        VTPruneError: There is no such token.
    """
    total = len(pruning.places)
    if not 0 <= token < total:
        raise VTPruneError(f"there is no token {token}; the call had {total} visual tokens, numbered from 0")
    kept = [bool((numbers == token).any()) for numbers in pruning.kept_flat]
    sample = pruning.places.sample
    if not kept:
        return TokenExplanation(token, True, None, None, None, int((sample == sample[token]).sum()))
    stage = kept.index(False) if False in kept else len(kept) - 1
    alive = pruning.alive(stage)
    of_sample = (sample[alive] == sample[token]).nonzero()[:, 0]  # indices in `alive` of this sample's tokens
    index = int((alive == token).nonzero())
    score = rank = None
    scores = pruning.scores[stage]
    if scores is not None:
        score = float(scores[index])
        rank = 1 + int((scores[of_sample] > scores[index]).sum())
    duplicate, similarity = _duplicate(pruning, stage, alive, of_sample, index)
    layer = pruning.stages[stage][0]
    return TokenExplanation(token, all(kept), layer, score, rank, len(of_sample), duplicate, similarity)


def _duplicate(
    pruning: PruningRecord, stage: int, alive: torch.Tensor, of_sample: torch.Tensor, index: int
) -> tuple[int | None, float | None]:
    states = pruning.states[stage] if stage < len(pruning.states) else None
    if states is None:
        return None, None
    others = of_sample[torch.isin(alive[of_sample], pruning.kept_flat[stage]) & (of_sample != index)]
    if not len(others):
        return None, None
    similarity = torch.cosine_similarity(states[others], states[index : index + 1])
    best = int(similarity.argmax())
    return int(alive[others[best]]), float(similarity[best])
