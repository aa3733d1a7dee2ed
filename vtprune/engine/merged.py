# SPDX-License-Identifier: Apache-2.0
"""Visual tokens in `inputs_embeds` into which the caller merged the visual features.

Such prompts have no placeholders. Visual positions are known from the caller (`patch.visual`), from
`mm_token_type_ids`, from ids passed to the outermost model, or from the features themselves: a few channels of every
row that an encoder returns are kept, and matched with the embeddings up to a cast. An embedding that matches neither
features nor the embedding table is foreign. Calls with foreign embeddings are refused, because these may be features
that were scaled, stored or made elsewhere, and would not be pruned. Features of models with visual words (Chameleon)
are rows of the embedding table and never foreign: they are known only by recent features.
"""

from __future__ import annotations

import functools
import math
from collections import deque
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..errors import NothingPrunedError, VTPruneError
from ..models import attention_probe, unsupported
from ..models.anatomy import Anatomy
from ..models.encoder_outputs import Encoded

_CHANNELS = 16  # of a row, enough to identify it
_CHUNK = 8192  # rows of the embedding table at a time


def _channels(x: Tensor) -> Tensor:
    """Evenly spaced channels `[N, C]` of rows `[..., D]`."""
    x = x.detach().flatten(0, -2)
    return x[:, :: max(1, x.shape[1] // _CHANNELS)][:, :_CHANNELS]


def _hashes(channels: Tensor) -> Tensor:
    """Hashes `[N]` int64 of rows `[N, C]`, equal for equal values."""
    bits = (channels.float() + 0.0).contiguous().view(torch.int32).long()  # + 0.0: -0 is 0
    factors = torch.randint(-(2**62), 2**62, (bits.shape[1],), generator=torch.Generator().manual_seed(0))
    return (bits * (2 * factors + 1).to(bits.device)).sum(1)  # modulo 2^64


def _casts(channels: Tensor, dtype: torch.dtype) -> Tensor:
    """Hashes `[n]` of rows cast to `dtype`, directly and through half precision."""
    variants = [channels.to(dtype), *(channels.to(half).to(dtype) for half in (torch.bfloat16, torch.float16))]
    return torch.cat([_hashes(variant) for variant in variants])


class Features:
    """Hashes of the recent outputs of a model's encoders, and of its embedding table."""

    def __init__(self) -> None:
        self.recent: deque[tuple[Tensor, Encoded]] = deque(maxlen=64)
        self._table: tuple[Any, Tensor] | None = None

    def add(self, output: Any, known: Encoded) -> None:
        """Adds the output of an encoder that ran outside the model's own call."""
        parts = getattr(output, "pooler_output", None)
        parts = output if parts is None else parts
        parts = list(parts) if isinstance(parts, (list, tuple)) else [parts]
        rows = [p for p in parts if isinstance(p, Tensor) and p.dim() > 1 and p.is_floating_point()]
        if rows and all(r.shape[-1] == rows[0].shape[-1] for r in rows):
            self.recent.append((torch.cat([_channels(r).to(rows[0]) for r in rows]), known))

    def remove(self, known: Encoded) -> None:
        """Removes an encoder run whose features were passed to the model as arguments."""
        self.recent = deque((entry for entry in self.recent if entry[1] is not known), maxlen=self.recent.maxlen)

    def match(self, embeds: Tensor, foreign: Tensor) -> tuple[Tensor, list[Encoded]]:
        """Finds recent features in a call, which stay recent: the same embeddings may come again.

        Args:
            embeds: `[B, T, D]` embeddings.
            foreign: `[B, T]` bool on the CPU, positions that hold no token's embedding.

        Returns:
            tuple: Mask `[B, T]` on the CPU of positions that hold features, and the encoder runs that they are from,
                without those whose features others have as well.
        """
        hashes, left = _hashes(_channels(embeds)), foreign.flatten()
        mask = torch.zeros_like(left)
        found: list[tuple[Tensor, Encoded]] = []
        for rows, known in reversed(list(self.recent)):
            if bool(mask[left].all()):
                break
            if rows.shape[1] == _channels(embeds[:1, :1]).shape[1]:
                matches = torch.isin(hashes, _casts(rows.to(embeds.device), embeds.dtype)).cpu()
                found += [(matches, known)] if bool((matches & ~mask).any()) else []
                mask |= matches
        sources, named = [], torch.zeros_like(mask)
        for matches, known in sorted(found, key=lambda run: int(run[0].sum()), reverse=True):
            sources += [known] if bool((matches & ~named).any()) else []
            named |= matches
        return mask.view(embeds.shape[:2]), sources

    def find_foreign(self, embeds: Tensor, embeddings: nn.Module) -> Tensor:
        """Mask `[B, T]` on the CPU of positions of `embeds` `[B, T, D]` that hold no token's embedding."""
        table, hashes = self._hashed_table(embeddings, embeds), _hashes(_channels(embeds))
        nearest = table[torch.searchsorted(table, hashes).clamp_max(len(table) - 1)]
        return (nearest != hashes).cpu().view(embeds.shape[:2])

    def forget_table(self) -> None:
        """Lets the embedding table be read again: writes to `weight.data` do not change its version."""
        self._table = None

    @torch.no_grad()
    def _hashed_table(self, embeddings: nn.Module, embeds: Tensor) -> Tensor:
        """Ascending hashes of the embeddings of all tokens, made once for each version of the weights."""
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
            self._table = (key, torch.cat([_casts(part, embeds.dtype) for part in rows]).unique())
        return self._table[1]


def find(
    inputs: dict[str, Any], outer: dict[str, Any], features: Features, anatomy: Anatomy, virtual: int
) -> tuple[Tensor | None, list[Encoded]]:
    """Finds merged features in the `inputs_embeds` of a call.

    Args:
        inputs: Keyword arguments of the composite, or of the decoder if it was called directly.
        outer: Keyword arguments of the outermost model.
        features: Recent outputs of the encoders, and the embedding table.
        anatomy: Parts of the model.
        virtual: Number of positions at the start of every row that an adapter fills.

    Returns:
        tuple: Kinds `[B, T]` uint8 of the positions on the CPU, 1 + the number of the kind, or None if there are no
            merged features; and the encoder runs with which they were matched.

    Raises:
        NothingPrunedError: There are merged features, and their positions are unknown.
    """
    embeds = inputs.get("inputs_embeds")
    if not isinstance(embeds, Tensor) or embeds.dim() != 3 or embeds.shape[1] == 1:
        return None, []
    unsupported.refuse_tracing(inputs)
    mask = inputs.get("attention_mask", outer.get("attention_mask"))
    left = 0
    for _ in range(2):
        search = functools.partial(features.find_foreign, embeds, anatomy.embeddings)
        foreign = attention_probe.without_hooks(search)
        foreign[:, :virtual] = False
        if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] >= foreign.shape[1]:
            foreign &= mask[:, -foreign.shape[1] :].bool().cpu()  # padding may hold anything
        if not bool(foreign.any()) and not features.recent:
            return None, []
        kinds, sources = _kinds(embeds, foreign, inputs, outer, features, anatomy)
        left = int((foreign & (kinds == 0)).sum())
        if left == 0:
            return kinds, sources
        features.forget_table()  # the known one may hold other embeddings than the model has now
    return refuse_foreign(left)


def _kinds(
    embeds: Tensor,
    foreign: Tensor,
    inputs: dict[str, Any],
    outer: dict[str, Any],
    features: Features,
    anatomy: Anatomy,
) -> tuple[Tensor, list[Encoded]]:
    """Kinds `[B, T]` of positions with features, as named by the caller, or else matched; and the matched runs."""
    is_foreign, names = bool(foreign.any()), list(anatomy.placeholders)
    named = _named_kinds(inputs, outer, foreign.shape, anatomy.placeholders) if is_foreign else None
    if named is not None:
        return named, []
    found, sources = features.match(embeds, foreign if is_foreign else torch.ones_like(foreign))
    if sources and not is_foreign:  # features that are visual words, rows of the embedding table
        refuse_part(int(found.sum()), [source.total for source in sources])
    return found.to(torch.uint8) * (1 + names.index(sources[0].kind) if sources else 1), sources


def _named_kinds(
    inputs: dict[str, Any], outer: dict[str, Any], shape: torch.Size, placeholders: dict[str, int]
) -> Tensor | None:
    """Kinds `[B, T]` of the positions, from token types, or from ids passed to the outermost model; else None."""
    types, ids = inputs.get("mm_token_type_ids", outer.get("mm_token_type_ids")), outer.get("input_ids")
    if isinstance(types, Tensor) and types.shape == shape:
        order = {"image": 1, "video": 2}  # numbers of transformers' processors
        kinds = torch.zeros(shape, dtype=torch.uint8)
        for number, name in enumerate(placeholders):
            kinds[types.cpu() == order.get(name, 0)] = number + 1 if name in order else 0
        return kinds
    if isinstance(ids, Tensor) and ids.shape == shape:
        return kinds_from_mask(ids, (shape[0], shape[1]), placeholders)
    return None


def kinds_from_mask(given: Tensor, shape: tuple[int, int], placeholders: dict[str, int]) -> Tensor | None:
    """Kinds of the positions of a call, from the argument of `patch.visual`.

    Args:
        given: `[B, T]`, a mask of bools or of 0 and 1, or token ids with placeholders.
        shape: `(B', T')` of the call; `generate` may have copied every row for beams.
        placeholders: Token id by kind.

    Returns:
        Tensor: `[B', T']` uint8 on the CPU, 1 + the number of the kind; None for a decoding step.

    Raises:
        VTPruneError: The shapes do not fit, or they are neither bools nor token ids.
    """
    try:
        given = torch.as_tensor(given).cpu()
    except (TypeError, ValueError) as error:
        raise VTPruneError(f"patch.visual was given {given!r:.60}; expected a [B, T] tensor of bools or ids") from error
    given = given[None] if given.dim() == 1 else given
    if shape[1] == 1 and given.shape[1] != 1:
        return None
    if given.dim() != 2 or given.shape[1] != shape[1] or shape[0] % given.shape[0]:
        raise VTPruneError(
            f"patch.visual was given shape {tuple(given.shape)}, but the call has {shape[0]} x {shape[1]} tokens; "
            "expected one bool or token id for each of them"
        )
    kinds = torch.zeros(given.shape, dtype=torch.uint8)
    if given.dtype == torch.bool or not bool(((given != 0) & (given != 1)).any()):
        kinds[given.bool()] = 1
    elif given.is_floating_point():
        raise VTPruneError(f"patch.visual was given {given.dtype} values other than 0 and 1; expected bools or ids")
    else:
        for number, token in enumerate(placeholders.values()):
            kinds[given == token] = number + 1
    return kinds.repeat_interleave(shape[0] // given.shape[0], 0)


def refuse_foreign(count: int) -> NoReturn:
    """Raises for a call with `count` foreign embeddings."""
    raise NothingPrunedError(
        f"inputs_embeds hold {count} embeddings that are no token's, probably merged features, and it is not known "
        "which positions are visual, so nothing would be pruned; pass input_ids with pixels or mm_encoder_outputs, "
        "name the visual positions (with patch.visual(mask): ..., [B, T] bools or the prompt's token ids), run the "
        "call inside patch.paused(), or, if an adapter was added after patching, patch the model that has it"
    )


def refuse_part(count: int, totals: list[int | None]) -> None:
    """Raises unless `count` embeddings can be all features of encoder runs with `totals` rows each (None: unknown)."""
    known = [total for total in totals if total]
    if len(known) == len(totals) and (count < min(known) or count % math.gcd(*known)):
        raise NothingPrunedError(
            f"inputs_embeds hold {count} embeddings of the pictures that were encoded last, which have "
            f"{' and '.join(map(str, sorted(set(known))))}, so it is not known which positions are visual; merge all "
            "features of pictures that were encoded after the model was patched, name the visual positions (with "
            "patch.visual(mask): ..., [B, T] bools or the prompt's token ids), or run the call inside patch.paused()"
        )
