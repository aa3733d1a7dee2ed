# SPDX-License-Identifier: Apache-2.0
"""What a method is handed at a stage: the visual tokens laid out flat, and q, k, v of decoder layers on request."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.tokens import AttentionInputs, Prompt, Tokens
from ..core.transfer import DeferredChecks, to_device
from ..errors import MethodError
from ..models import attention_probe
from .call import CallState, MethodCall, Snapshot
from .columns import slot_of_position

_PLACES = ("sample", "image", "frame", "crop", "grid_row", "grid_col", "index", "feature")


def tokens(
    call: CallState,
    mine: MethodCall,
    number: int,
    flat: Tensor,
    wanted: Tensor,
    here: Snapshot,
    checks: DeferredChecks,
) -> Tokens:
    """Lays out the live visual tokens before layer `number`.

    Args:
        call: The running call.
        mine: What the method has to do in it.
        number: The layer that the stage stands before.
        flat: `[M]` numbers of the live tokens among all visual tokens of the call.
        wanted: `[S]` budgets of the pools.
        here: The layer's input.
        checks: Takes that no visual token holds NaN or Inf, which raises `MethodError`, and what the method reads.
    """
    visual, spec = call.visual, call.spec
    assert visual is not None
    device = here.hidden.device
    rows = visual.sample[flat]
    slot = call.columns.slot_of_position()[rows, visual.position[flat]]
    states = here.hidden[to_device(rows, device), to_device(slot, device)]  # [M, D]
    finite = torch.isfinite(states).all(-1)

    def refuse() -> None:
        bad = ", ".join(map(str, rows[~finite.cpu()].unique().tolist()))
        raise MethodError(
            f"visual tokens of sample {bad} hold NaN or Inf before layer {number}: scores would be meaningless; "
            "check the "
            "image features"
        )

    checks.add(finite.all(), refuse)

    def read(_: Tokens, which: int, rope: bool, queries: str) -> AttentionInputs:
        if which != number and which not in call.snapshots:
            raise MethodError(
                f"the input of layer {which} was not kept; name it in the `required_layer_inputs` of "
                f"{type(mine.use.method).__name__}"
            )
        return attention_inputs(call, mine, which, call.snapshots.get(which, here), flat, rope, queries, checks)

    def record(name: str, value: Any) -> Any:
        return (
            value[to_device(rows, value.device), to_device(slot, value.device)] if name in spec.column_taps else value
        )

    sizes = torch.bincount(mine.groups.of_token[flat], minlength=len(mine.groups.sizes))
    places: dict[str, Any] = {name: to_device(getattr(visual, name)[flat], device) for name in _PLACES}
    return Tokens(
        hidden=states,
        offsets=_offsets(sizes.tolist(), device),
        budgets=to_device(wanted, device),
        max_budget=int(wanted.max()) if len(wanted) else 0,
        max_length=int(sizes.max()) if len(sizes) else 0,
        originals=to_device(torch.tensor(mine.groups.sizes), device),
        position=to_device(visual.position[flat], device),
        layer=number,
        stage=list(mine.counts).index(number),
        num_layers=spec.anatomy.num_layers,
        recorded={
            name.removeprefix(mine.use.prefix): [record(name, value) for value in values]
            for name, values in call.recorded.items()
            if name in mine.use.tap_names
        },
        inputs=call.inputs,
        anatomy=spec.anatomy,
        memory=mine.memory,
        prompt=_prompt(call, mine, flat).to(device),
        reader=read,
        **places,
    )


@dataclass
class _Sample:
    """One sample with visual tokens.

    Attributes:
        row: Row of the batch.
        here: Columns that hold a token at this stage, text or visual.
        text: Those of the text after the last visual token; the last column if there is none.
        mine: Columns of the live visual tokens.
    """

    row: int
    here: Tensor
    text: Tensor
    mine: Tensor


def _samples(call: CallState, mine: MethodCall, slot: Tensor, flat: Tensor) -> Iterator[_Sample]:
    visual = call.visual
    assert visual is not None
    for row in mine.groups.by_sample:
        here = ((slot[row] >= 0) & call.columns.real[row]).nonzero()[:, 0]
        last = visual.position[visual.sample == row].max()
        if call.answer_starts is not None:  # the answer is not there yet
            here = here[here < max(call.answer_starts[row], int(last) + 1)]
        text = here[(here > last) & ~visual.mask[row, here]]
        own = visual.position[flat[visual.sample[flat] == row]]
        yield _Sample(row, here, text if len(text) else here[-1:], own)


def _prompt(call: CallState, mine: MethodCall, flat: Tensor) -> Prompt:
    """Where every token of the samples with visual tokens stands at this stage, on the CPU."""
    slot = call.columns.slot_of_position()
    batch, column, text, visual_rows = [], [], [], []
    lengths: list[int] = []
    text_lengths: list[int] = []
    for sample in _samples(call, mine, slot, flat):
        order = torch.full((call.columns.length,), -1)
        order[sample.here] = torch.arange(len(sample.here)) + sum(lengths)
        batch.append(torch.full_like(sample.here, sample.row))
        column.append(slot[sample.row, sample.here])
        text.append(order[sample.text])
        visual_rows.append(order[sample.mine])
        lengths.append(len(sample.here))
        text_lengths.append(len(sample.text))
    cpu = torch.device("cpu")
    return Prompt(
        batch=torch.cat(batch),
        slot=torch.cat(column),
        offsets=_offsets(lengths, cpu),
        visual=torch.cat(visual_rows),
        text=torch.cat(text),
        text_offsets=_offsets(text_lengths, cpu),
    )


def attention_inputs(
    call: CallState,
    mine: MethodCall,
    number: int,
    snapshot: Snapshot,
    flat: Tensor,
    rope: bool,
    queries: str,
    checks: DeferredChecks,
) -> AttentionInputs:
    """Probes a layer and lays out its queries, keys and values over the samples that have visual tokens.

    Args:
        call: The running call.
        mine: What the method has to do in it.
        number: The layer.
        snapshot: Its input.
        flat: `[M]` numbers of the live visual tokens.
        rope: False for queries and keys before rotation; then keys that an earlier call left in the cache, which are
            rotated, are left out.
        queries: "text" or "last".
        checks: Takes that queries and keys are finite.
    """
    probed = attention_probe.probe(snapshot.layer, snapshot.args, snapshot.kwargs, rope)
    device = probed.key.device
    past = _past_keys(call, number, snapshot.cached_tokens) if rope else None
    slot = slot_of_position(snapshot.index, snapshot.valid, call.columns.length)
    query, query_order, visual_rows, keys, values = [], [], [], [], []
    query_lengths: list[int] = []
    key_lengths: list[int] = []
    for sample in _samples(call, mine, slot, flat):
        asked = sample.text if queries == "text" else sample.here[-1:]
        row, here = sample.row, to_device(slot[sample.row, sample.here], device)
        key, value = probed.key[row][:, here].transpose(0, 1), probed.value[row][:, here].transpose(0, 1)  # [C, G, d]
        before = 0
        if past is not None:
            before = len(past[row][0])
            key, value = torch.cat([past[row][0].to(key), key]), torch.cat([past[row][1].to(value), value])
        order = torch.full((call.columns.length,), -1)
        order[sample.here] = torch.arange(len(sample.here)) + before
        query.append(probed.query[row][:, to_device(slot[row, asked], device)].transpose(0, 1))  # [R, H, d]
        query_order.append(order[asked])
        visual_rows.append(order[sample.mine] + sum(key_lengths))
        keys.append(key)
        values.append(value)
        query_lengths.append(len(asked))
        key_lengths.append(len(key))
    finite = torch.stack([torch.isfinite(x).all() for x in (*query, *keys)]).all()
    rows = [sample.row for sample in _samples(call, mine, slot, flat)]
    checks.add(finite, lambda: _refuse_infinite(rows, query, keys, number))
    return AttentionInputs(
        queries=torch.cat(query),
        query_offsets=_offsets(query_lengths, device),
        query_order=to_device(torch.cat(query_order), device),
        keys=torch.cat(keys),
        values=torch.cat(values),
        key_offsets=_offsets(key_lengths, device),
        visual=to_device(torch.cat(visual_rows), device),
        scaling=probed.scaling,
        softcap=probed.softcap,
    )


def _refuse_infinite(rows: list[int], queries: list[Tensor], keys: list[Tensor], number: int) -> None:
    """Raises `MethodError`: text or visual tokens of some sample have queries or keys that are NaN or Inf."""
    pairs = zip(rows, queries, keys, strict=True)
    bad = ", ".join(str(row) for row, q, k in pairs if not bool(torch.isfinite(q).all() & torch.isfinite(k).all()))
    raise MethodError(
        f"queries or keys of sample {bad} hold NaN or Inf in layer {number}: attention would be meaningless; check the "
        "embeddings of its text and the image features"
    )


def _past_keys(call: CallState, number: int, held: int) -> list[tuple[Tensor, Tensor]] | None:
    """Keys and values of the `held` slots that earlier calls left in a layer, `[C, G, d]` per sample, without
    padding."""
    cache, state = call.columns.cache, call.columns.state
    layer = cache.layers[number] if cache is not None and number < len(cache.layers) else None
    keys = getattr(layer, "keys", None)
    if layer is None or held == 0 or not isinstance(keys, Tensor) or keys.dim() < 4 or layer.is_sliding:
        return None  # a sliding window has forgotten part of the past; all of it is left out then
    slots = state.slots(number, held) if state is not None else None
    slots = torch.arange(held).expand(call.columns.batch, -1) if slots is None else slots.cpu()
    visible = slots >= 0
    if call.real_past is not None:
        visible = visible & call.real_past.gather(1, slots.clamp(min=0))
    return [
        (layer.keys[row][:, :held][:, seen].transpose(0, 1), layer.values[row][:, :held][:, seen].transpose(0, 1))
        for row, seen in enumerate(visible.to(keys.device))
    ]


def _offsets(lengths: list[int], device: torch.device) -> Tensor:
    return to_device(torch.tensor([0, *lengths]).cumsum(0), device)
