# SPDX-License-Identifier: Apache-2.0
"""Prompts given as embeddings, into which a caller put the visual features by hand.

No placeholder is left in them that would tell which columns are visual. They are told by what the caller says
(`patch.visual`), by `mm_token_type_ids`, by ids that the outermost model was given, or by the features themselves: what
encoders return is remembered by a few channels of every row, and found again in the embeddings up to a cast. A column
that is none of this and no token's embedding either is foreign: such a call is refused, because it may hold features
that were scaled, stored or made elsewhere, and nothing of them would be pruned.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import NothingPrunedError, VTPruneError
from ..models.encoder_outputs import Encoded

_CHANNELS = 16  # of a row, enough to tell rows apart
_CHUNK = 8192  # rows of the embedding table at a time


def _channels(x: Tensor) -> Tensor:
    """`[..., D]` to `[N, C]`, evenly spaced channels."""
    x = x.detach().flatten(0, -2)
    return x[:, :: max(1, x.shape[1] // _CHANNELS)][:, :_CHANNELS]


def _hashes(channels: Tensor) -> Tensor:
    """`[N]` int64 hashes of rows `[N, C]`, equal for equal numbers."""
    bits = (channels.float() + 0.0).contiguous().view(torch.int32).long()  # + 0.0: -0 is 0
    factors = torch.randint(-(2**62), 2**62, (bits.shape[1],), generator=torch.Generator().manual_seed(0))
    return (bits * (2 * factors + 1).to(bits.device)).sum(1)  # wraps around


def _casts(channels: Tensor, dtype: torch.dtype) -> Tensor:
    """`[n]` hashes of rows as they would be in `dtype`, on a direct way or through half precision."""
    ways = [channels.to(dtype), *(channels.to(half).to(dtype) for half in (torch.bfloat16, torch.float16))]
    return torch.cat([_hashes(way) for way in ways])


class Features:
    """What encoders of one model returned lately, and the model's own embeddings, by hashes."""

    def __init__(self) -> None:
        self.recent: deque[tuple[Tensor, Encoded]] = deque(maxlen=64)
        self._table: tuple[Any, Tensor] | None = None

    def note(self, output: Any, known: Encoded) -> None:
        """Remembers what an encoder returned, outside the model's own call."""
        parts = getattr(output, "pooler_output", None)
        parts = output if parts is None else parts
        parts = list(parts) if isinstance(parts, (list, tuple)) else [parts]
        rows = [p for p in parts if isinstance(p, Tensor) and p.dim() > 1 and p.is_floating_point()]
        if rows and all(r.shape[-1] == rows[0].shape[-1] for r in rows):
            self.recent.append((torch.cat([_channels(r).to(rows[0]) for r in rows]), known))

    def forget(self, known: Encoded) -> None:
        """Drops what is known to have come to the model by its arguments."""
        self.recent = deque((entry for entry in self.recent if entry[1] is not known), maxlen=self.recent.maxlen)

    def found(self, embeds: Tensor) -> tuple[Tensor, list[Encoded]]:
        """`[B, T]` bool on the CPU: which columns hold remembered features; and the encodings that they are from."""
        mine, seen, sources = _hashes(_channels(embeds)), torch.zeros(embeds.shape[:2].numel(), dtype=torch.bool), []
        for rows, known in list(self.recent):
            if rows.shape[1] == _channels(embeds[:1, :1]).shape[1]:
                here = torch.isin(mine, _casts(rows.to(embeds.device), embeds.dtype)).cpu()
                seen |= here
                sources += [known] if bool(here.any()) else []
        return seen.view(embeds.shape[:2]), sources

    def foreign(self, embeds: Tensor, embeddings: nn.Module) -> Tensor:
        """`[B, T]` bool on the CPU: which columns of `embeds` `[B, T, D]` hold no token's embedding."""
        table = self._hashed_table(embeddings, embeds)
        return ~torch.isin(_hashes(_channels(embeds)), table).cpu().view(embeds.shape[:2])

    @torch.no_grad()
    def _hashed_table(self, embeddings: nn.Module, embeds: Tensor) -> Tensor:
        weight: Any = getattr(embeddings, "weight", None)
        try:
            version = weight._version
        except (AttributeError, RuntimeError):  # inference tensors have none
            version = None
        key = (id(weight), version, embeds.dtype, embeds.device)
        if self._table is None or self._table[0] != key:
            count = int(getattr(embeddings, "num_embeddings", 0) or weight.shape[0])
            device = embeds.device if weight is None or weight.is_meta else weight.device
            ids = torch.arange(count, device=device).split(_CHUNK)
            rows = [_channels(embeddings(part)).to(embeds.device) for part in ids]
            self._table = (key, torch.cat([_casts(part, embeds.dtype) for part in rows]))
        return self._table[1]


def said_columns(said: Tensor, shape: tuple[int, int], placeholders: dict[str, int]) -> Tensor | None:
    """The kinds that `patch.visual` names for a call.

    Args:
        said: `[B, T]`, a bool mask, one of 0 and 1, or token ids with placeholders.
        shape: `(B', T')` of the call; `generate` may have copied every row for beams.
        placeholders: Kind to token id.

    Returns:
        Tensor: `[B', T']` uint8 on the CPU, 1 + the number of the kind; None for a decoding step.

    Raises:
        VTPruneError: The shapes do not fit.
    """
    said = torch.as_tensor(said).cpu()
    said = said[None] if said.dim() == 1 else said
    if shape[1] == 1 and said.shape[1] != 1:
        return None
    if said.dim() != 2 or said.shape[1] != shape[1] or shape[0] % said.shape[0]:
        raise VTPruneError(
            f"patch.visual was given {tuple(said.shape)} columns, but the call has {shape[0]} x {shape[1]}; expected "
            "one bool or token id for each column of this very call"
        )
    kinds = torch.zeros(said.shape, dtype=torch.uint8)
    if said.dtype == torch.bool or not bool(((said != 0) & (said != 1)).any()):
        kinds[said.bool()] = 1
    else:
        for number, token in enumerate(placeholders.values()):
            kinds[said == token] = number + 1
    return kinds.repeat_interleave(shape[0] // said.shape[0], 0)


def refuse_foreign(count: int) -> None:
    """Raises for a call whose embeddings hold `count` columns of which nothing is known."""
    raise NothingPrunedError(
        f"inputs_embeds hold {count} columns that are no token's embedding, as if features were put there by hand, and "
        "it is not known which of them are visual, so nothing would be pruned; pass input_ids with pixels or "
        "mm_encoder_outputs, say which columns are visual (with patch.visual(mask): ..., [B, T] bools or the prompt's "
        "token ids), or run the call inside patch.paused()"
    )
