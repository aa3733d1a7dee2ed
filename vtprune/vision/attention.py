# SPDX-License-Identifier: Apache-2.0
"""Queries and keys of one layer of the vision tower, and the attention that patches receive in it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from vtprune_kernels import received_attention

from ..core.method import Tap
from ..core.options import Positive
from ..errors import MethodError
from ..models.arguments import parameters_of
from ..models.attention_probe import QKV, Watch, probe

if TYPE_CHECKING:
    from ..models.anatomy import Anatomy

LAYER = "vision.layer"
Queries = Positive | Literal["auto", "all"]
LARGE, SAMPLE = 2048, 512  # patches from which on "auto" samples, and rows that it takes
_CLASS_TOKENS = {"class_embedding", "cls_token", "class_token"}


def vision_layers(anatomy: Anatomy) -> nn.ModuleList:
    """The longest list of blocks in the vision tower.

    Raises:
        MethodError: The tower has none.
    """
    lists = [m for m in anatomy.vision_tower.modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        raise MethodError(
            f"the vision tower {type(anatomy.vision_tower).__name__} has no list of layers whose attention could be "
            "read; choose a method that needs none, such as 'divprune'"
        )
    return max(lists, key=len)


def layer_number(anatomy: Anatomy, which: int | Literal["feature", "last"]) -> int:
    """Number of a vision layer, 0-based.

    Args:
        anatomy: Parts of the model.
        which: "feature" is the layer whose output goes to the projector, "last" the last one; a number counts from the
            end if it is negative. Instead of a layer with window attention, the nearest one before (else after) it with
            full attention is taken.
    """
    total = len(vision_layers(anatomy))
    if which == "feature":
        feature = getattr(anatomy.config, "vision_feature_layer", None)
        feature = feature[-1] if isinstance(feature, (list, tuple)) else feature
        # hidden_states[0] is the embedding, so state i is the output of layer i - 1.
        number = total - 1 if feature is None else feature + total if feature < 0 else feature - 1
    else:
        number = total - 1 if which == "last" else which + total if which < 0 else which
    if not 0 <= number < total:
        raise MethodError(
            f"vision layer {which!r} does not exist: the vision tower has {total} layers; expected "
            f"{-total} to {total - 1}"
        )
    whole = getattr(anatomy.vision_tower, "fullatt_block_indexes", None)
    if whole and number not in whole:
        number = max((i for i in whole if i < number), default=min(whole))
    return number


class LayerCall(NamedTuple):
    """One call of a vision layer.

    Attributes:
        layer, args, kwargs: The layer and its arguments.
        output: Its output, if that is kept.
        probe: Runs the layer up to its attention, as `attention_probe.probe` does for layers of transformers.
        watch: What the layer passed to its attention function in this call, if that was seen.
    """

    layer: nn.Module
    args: tuple
    kwargs: dict[str, Any]
    output: Any = None
    probe: Callable[..., QKV] = probe
    watch: Watch | None = None

    def read(self, hidden: Tensor, named: dict[str, Any], rope: bool) -> QKV:
        """Queries and keys of the call, from what was seen of it, else by running the layer once more.

        Args:
            hidden: `[..., N, D]` states that entered.
            named: All other arguments, for that run.
            rope: False for queries and keys before rotation.
        """
        rope = rope or named.get("position_embeddings") is None
        if self.watch is None:
            return self.probe(self.layer, (hidden,), named, rope)
        seen = self.watch.whole(hidden.shape[-2]) if rope else None
        return seen or self.probe(self.layer, (hidden,), named, rope, self.watch.projections)


def layer_tap(anatomy: Anatomy, which: int | Literal["feature", "last"], keep_output: bool = False) -> Tap:
    """Tap that records the inputs of one vision layer, from which queries and keys are computed on demand.

    Args:
        anatomy: Parts of the model.
        which: See `layer_number`.
        keep_output: Keep the layer's output too, for `Vision.class_states`.
    """
    layer = vision_layers(anatomy)[layer_number(anatomy, which)]

    def record(args: tuple, kwargs: dict[str, Any], output: Any, watch: Watch | None = None) -> LayerCall:
        return LayerCall(layer, args, kwargs, output if keep_output else None, watch=watch)

    return Tap(LAYER, layer, record, watched=True)


@dataclass
class Attention:
    """Queries and keys of one call of a vision layer.

    Attributes:
        query, key: `[B, H, N, dh]`, after q/k norms and rotation.
        scaling: Factor on the dot product.
        offsets: `[S + 1]` offsets along `N` of images and frames that share a packed sequence, or None.
        valid: `[B, N]` bool, False for padded patches; or None.
        prefix: Class and register tokens in front of each crop.
    """

    query: Tensor
    key: Tensor
    scaling: float
    offsets: Tensor | None
    valid: Tensor | None
    prefix: int

    def received(self, rows: Tensor | None = None) -> Tensor:
        """Attention `[B, N]` received, averaged over heads and queries (those in `rows` `[B, N]`); 0 for padding."""
        if self.valid is None:
            return received_attention(self.query, self.key, self.scaling, rows, self.offsets)
        query, key = (
            t.transpose(1, 2)[self.valid].transpose(0, 1)[None] for t in (self.query, self.key)
        )  # [1, H, V, dh]
        offsets = nn.functional.pad(self.valid.sum(1).cumsum(0), (1, 0))
        chosen = None if rows is None else rows[self.valid][None]
        out = torch.zeros(self.valid.shape, device=self.query.device, dtype=torch.float32)
        out[self.valid] = received_attention(query, key, self.scaling, chosen, offsets)[0]
        return out

    def sampled(self, queries: Queries) -> Tensor | None:
        """`[N]` or `[B, N]` bool: query rows for `received`; None for all of them.

        Args:
            queries: `"all"`; a number of rows of every picture; `"auto"`, 512 of pictures with 2,048 patches or more.
        """
        batch, _, length, _ = self.query.shape
        if self.valid is not None:
            sizes = self.valid.sum(1).tolist()
        else:
            sizes = [length] if self.offsets is None else self.offsets.diff().tolist()
        counts = [_rows_of(size, queries) for size in sizes]
        if counts == sizes:
            return None
        parts = [stratified(size, count) for size, count in zip(sizes, counts, strict=True)]
        if self.valid is None:
            return torch.cat(parts).to(self.query.device)
        rows = torch.zeros(batch, length, dtype=torch.bool, device=self.query.device)
        rows[self.valid] = torch.cat(parts).to(rows.device)
        return rows

    def of_class_token(self) -> Tensor:
        """Attention `[B, N]` from the class token (row 0), averaged over heads."""
        rows = torch.zeros(self.query.shape[0], self.query.shape[2], dtype=torch.bool, device=self.query.device)
        rows[:, 0] = True
        return self.received(rows)


def _rows_of(size: int, queries: Queries) -> int:
    if isinstance(queries, int):
        return min(size, queries)
    return SAMPLE if queries == "auto" and size >= LARGE else size


def stratified(size: int, count: int) -> Tensor:
    """`[size]` bool with about `count` True: one in each of `count` equal runs, at places that differ between runs.

    The places inside the runs are multiples of the golden ratio: spread evenly, the same for everybody, and in step
    with no row of a grid.
    """
    runs = torch.arange(count, dtype=torch.float64)
    chosen = torch.zeros(size, dtype=torch.bool)
    chosen[((runs + runs * 0.6180339887498949 % 1) * (size / count)).long().clamp_max(size - 1)] = True
    return chosen


def _valid_patches(mask: Any, batch: int, length: int) -> Tensor | None:
    """Mask `[B, N]` of patches that are not padding, from a vision layer's attention mask; None if none is padding."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor):  # flex attention's BlockMask
        from torch.nn.attention.flex_attention import create_mask

        mask = create_mask(mask.mask_mod, batch, 1, length, length, device=mask.kv_indices.device)
    seen = mask if mask.dtype == torch.bool else mask > 0 if mask.dim() == 2 else mask >= 0
    seen = seen.reshape(len(seen), -1, length).expand(batch, -1, -1)  # [B, queries or 1, N]
    valid = seen.any(1)
    if not (seen == valid[:, None]).all():
        raise MethodError(
            "the vision layer's mask hides more than padding; expected every patch to attend to all patches but "
            "padding; choose a method that needs no attention of the tower, such as 'divprune'"
        )
    return None if valid.all() else valid


def read_attention(record: LayerCall, rows: int, packed: bool, rope: bool) -> Attention:
    """Reads queries and keys of a call that `layer_tap` recorded.

    Args:
        record: The recorded call.
        rows: Projector rows of each crop of that call.
        packed: Whether the tower works on one packed sequence.
        rope: False for queries and keys before rotation.
    """
    named = parameters_of(record.layer).bind(record.args, record.kwargs)
    hidden = named.pop(next(iter(named)))
    offsets = named.get("cu_seqlens")
    if offsets is not None:  # as one sequence, because the probe stops at the first of several attention calls
        total = int(offsets[-1])
        named["cu_seqlens"] = offsets.new_tensor([0, total])
        if named.get("max_seqlen") is not None:
            named["max_seqlen"] = total
    read = record.read(hidden, named, rope)
    batch, _, length, _ = read.query.shape
    block = math.isqrt(length // max(rows, 1))
    prefix = 0 if packed else length - block * block * rows
    valid = _valid_patches(named.get("attention_mask"), batch, length)
    return Attention(read.query, read.key, read.scaling, offsets, valid, prefix)


def has_class_token(anatomy: Anatomy) -> bool:
    """Whether row 0 of the attention of a vision layer belongs to a class token."""
    return any(name.rpartition(".")[2] in _CLASS_TOKENS for name, _ in anatomy.vision_tower.named_parameters())
