# SPDX-License-Identifier: Apache-2.0
"""TokenExplanation a visual token was kept or dropped: its score, its rank, and the kept token that it duplicates most.

Scores are what the method ranked by. Duplicates need the states of the tokens, which nothing else keeps: calls inside
`recording()` keep them, at the cost of copying them to the CPU at every cut.
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
    """Prefills of the calling thread keep the states of their visual tokens, for `Pruning.explain_token`."""
    before = _recording.set(True)
    try:
        yield
    finally:
        _recording.reset(before)


def wanted() -> bool:
    """Whether the running prefill is to keep states."""
    return _recording.get()


@dataclass(frozen=True)
class TokenExplanation:
    """What decided about one visual token.

    Attributes:
        token: Its number among the visual tokens of the call.
        kept: Whether it survived to the end.
        layer: The layer before which it was dropped, or of the last cut that it survived; None where nothing was cut.
        score: What the method gave it there; None for methods that choose without scores.
        rank: 1 for the highest score; None without scores.
        rank_of: Tokens of its sample that were alive there.
        duplicate: The other token that stayed there and whose state points most nearly the same way; None without
            recorded states, or if no other stayed.
        similarity: Cosine of the two states, in [-1, 1].
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
        """For logs."""
        return asdict(self)


def explain_token(pruning: PruningRecord, token: int) -> TokenExplanation:
    """Looks up one token, see `TokenExplanation`.

    Raises:
        VTPruneError: There is no such token.
    """
    total = len(pruning.places)
    if not 0 <= token < total:
        raise VTPruneError(f"token {token} was asked for; the call had {total} visual tokens, numbered from 0")
    stayed = [bool((kept == token).any()) for kept in pruning.kept_flat]
    sample = pruning.places.sample
    if not stayed:
        return TokenExplanation(token, True, None, None, None, int((sample == sample[token]).sum()))
    stage = stayed.index(False) if False in stayed else len(stayed) - 1
    alive = pruning.alive(stage)
    alive_here = (sample[alive] == sample[token]).nonzero()[:, 0]  # places in `alive` of this sample's tokens
    mine = int((alive == token).nonzero())
    score = rank = None
    scores = pruning.scores[stage]
    if scores is not None:
        score = float(scores[mine])
        rank = 1 + int((scores[alive_here] > scores[mine]).sum())
    duplicate, similarity = _duplicate(pruning, stage, alive, alive_here, mine)
    layer = pruning.stages[stage][0]
    return TokenExplanation(token, all(stayed), layer, score, rank, len(alive_here), duplicate, similarity)


def _duplicate(
    pruning: PruningRecord, stage: int, alive: torch.Tensor, alive_here: torch.Tensor, mine: int
) -> tuple[int | None, float | None]:
    states = pruning.states[stage] if stage < len(pruning.states) else None
    if states is None:
        return None, None
    others = alive_here[torch.isin(alive[alive_here], pruning.kept_flat[stage]) & (alive_here != mine)]
    if not len(others):
        return None, None
    near = torch.cosine_similarity(states[others], states[mine : mine + 1])
    best = int(near.argmax())
    return int(alive[others[best]]), float(near[best])
