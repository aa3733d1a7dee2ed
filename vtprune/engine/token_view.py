# SPDX-License-Identifier: Apache-2.0
"""Inputs of a method at a stage: the visual tokens laid out flat, and q, k, v of decoder layers on request."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.lent import Lent
from ..core.taps import mean_of_streams
from ..core.tokens import AttentionInputs, Prompt, Tokens
from ..core.transfer import DeferredChecks, to_device
from ..errors import MethodError
from ..models.attention_probe import QKV, expanded
from ..models.visual_tokens import VisualTokens
from .call import CallState, MethodPlan, Snapshot
from .columns import slot_of_position

_PLACES = ("sample", "image", "frame", "crop", "grid_row", "grid_col", "index", "position", "feature")


def all_tokens(visual: VisualTokens) -> Tensor:
    """Numbers `[M]` of all visual tokens."""
    return visual.cached("all tokens", lambda: torch.arange(len(visual)))


def _is_uncut(call: CallState) -> bool:
    """Whether nothing was cut yet and one method prunes all visual tokens, so that only the layout matters."""
    return not call.columns.is_cut and len(call.spec.uses) == 1


def _text_key(call: CallState) -> tuple | None:
    """Cache key of the positions of a prompt's text, besides those of its visual tokens and its padding."""
    return None if call.answer_starts is None else tuple(call.answer_starts)


def tokens(
    call: CallState,
    plan: MethodPlan,
    number: int,
    flat: Tensor,
    snapshot: Snapshot,
    checks: DeferredChecks,
    lent: Lent,
) -> Tokens:
    """Lays out the live visual tokens before layer `number`.

    Args:
        call: The call in progress.
        plan: The method's task in it.
        number: The layer after the cut.
        flat: `[M]` numbers of the live tokens among all visual tokens of the call.
        snapshot: The layer's input.
        checks: Gets the checks that states, and queries and keys that the method reads, are finite.
        lent: Gets the tensors that the method sees and other calls or the model use, too.
    """
    visual, device = call.visual, snapshot.hidden.device
    assert visual is not None
    whole = _is_uncut(call)
    rows = visual.sample if whole else visual.sample[flat]
    slot = visual.position if whole else call.columns.slot_of_position()[rows, visual.position[flat]]

    def lay_out() -> tuple[Tensor, dict[str, Any]]:
        places = to_device(rows * snapshot.hidden.shape[1] + slot, device)
        return places, _fields(call, visual, plan, number, flat, device)

    key = ("tokens", device, plan.use.method.group, tuple(plan.counts[number]), _text_key(call))
    places, fields = visual.cached(key, lay_out) if whole else lay_out()
    for name, value in (*fields.items(), *((f"prompt.{name}", x) for name, x in vars(fields["prompt"]).items())):
        lent.add(f"tokens.{name}", value)
    states = snapshot.hidden.flatten(0, 1).index_select(0, places)
    states = mean_of_streams(states, call.spec.anatomy.width or states.shape[-1])  # [M, D]
    checks.add(states, lambda: _refuse_states(states, rows, number))

    def read(_: Tokens, which: int, rope: bool, queries: str) -> AttentionInputs:
        if queries not in ("text", "last"):
            raise MethodError(f"attention_inputs was given queries={queries!r}; expected 'text' or 'last'")
        if which != number and which not in call.snapshots:
            raise MethodError(
                f"the input of layer {which} was not kept; return the layer from `required_layer_inputs` of "
                f"{type(plan.use.method).__name__}"
            )
        snapshot_ = call.snapshots.get(which, snapshot)
        inputs = attention_inputs(call, plan, which, snapshot_, flat, rope, queries, checks)
        for name in ("queries", "keys", "values"):
            lent.add(f"the layer's {name}", getattr(inputs, name))
        return inputs

    return Tokens(
        hidden=states,
        layer=number,
        stage=list(plan.counts).index(number),
        num_layers=call.spec.anatomy.num_layers,
        recorded=_records(call, plan, rows, slot),
        inputs=call.inputs,
        anatomy=call.spec.anatomy,
        memory=call.memory.setdefault(plan.use.prefix, {}),
        reader=read,
        **fields,
    )


def _fields(
    call: CallState, visual: VisualTokens, plan: MethodPlan, number: int, flat: Tensor, device: torch.device
) -> dict[str, Any]:
    """The fields of `Tokens` that depend on nothing but the layout of the prompt and the budget."""
    groups, counts, whole = plan.groups, plan.counts[number], _is_uncut(call)
    places = {name: getattr(visual, name) for name in _PLACES}
    if len(call.spec.uses) > 1:
        places["index"] = _own_index(visual, plan)
    sizes = groups.sizes if whole else groups.count(flat)
    return {n: to_device(x.clone() if whole else x[flat], device) for n, x in places.items()} | {
        "offsets": _offsets(sizes, device),
        "originals": to_device(torch.tensor(groups.sizes), device),
        "budgets": to_device(torch.tensor(counts), device),
        "max_budget": max(counts, default=0),
        "max_length": max(sizes, default=0),
        "prompt": _prompt(call, plan, flat).to(device),
    }


def _records(call: CallState, plan: MethodPlan, rows: Tensor, slot: Tensor) -> dict[str, list]:
    """The records of the method's taps; those over prompt positions at the tokens' rows and slots `[M]`."""
    use, found = plan.use, {}
    for name, values in call.recorded.items():
        if name in use.tap_names & call.spec.column_taps:
            values = [x[to_device(rows, x.device), to_device(slot, x.device)] for x in values]
        if name in use.tap_names:
            found[name.removeprefix(use.prefix)] = list(values)
    return found


def _refuse_states(states: Tensor, rows: Tensor, number: int) -> None:
    """Raises `MethodError` if states `[M, D]` before layer `number` hold NaN or Inf, and names their samples."""
    bad = rows[~torch.isfinite(states).all(-1).cpu()].unique().tolist()
    if bad:
        raise MethodError(
            f"visual tokens of sample {', '.join(map(str, bad))} hold NaN or Inf before layer {number}, so scores "
            "would be meaningless; check the image features"
        )


def _own_index(visual: VisualTokens, plan: MethodPlan) -> Tensor:
    """Index `[M]` of each visual token among those of its sample that the method prunes."""
    own = plan.members
    before = own.cumsum(0) - own.long()
    first = torch.searchsorted(visual.sample, visual.sample)  # first token of the sample
    return before - before[first]


@dataclass
class _Sample:
    """One sample with visual tokens.

    Attributes:
        row: Row of the batch.
        positions: Positions of the tokens that are left at this stage, text or visual.
        text: Positions of the text after the last visual token; the last position if there is none.
        visual: Positions of the live visual tokens.
    """

    row: int
    positions: Tensor
    text: Tensor
    visual: Tensor


def _samples(call: CallState, plan: MethodPlan, slot: Tensor, flat: Tensor) -> list[_Sample]:
    visual = call.visual
    assert visual is not None
    if _is_uncut(call):
        key = ("samples", _text_key(call))
        return visual.cached(key, lambda: list(_each_sample(call, visual, plan, slot, flat)))
    return list(_each_sample(call, visual, plan, slot, flat))


def _each_sample(
    call: CallState, visual: VisualTokens, plan: MethodPlan, slot: Tensor, flat: Tensor
) -> Iterator[_Sample]:
    for row in plan.groups.by_sample:
        positions = ((slot[row] >= 0) & call.columns.real[row]).nonzero()[:, 0]
        last = visual.position[visual.sample == row].max()
        if call.answer_starts is not None:  # the selection must not depend on the answer
            positions = positions[positions < max(call.answer_starts[row], int(last) + 1)]
        text = positions[(positions > last) & ~visual.mask[row, positions]]
        own = visual.position[flat[visual.sample[flat] == row]]
        yield _Sample(row, positions, text if len(text) else positions[-1:], own)


def _prompt(call: CallState, plan: MethodPlan, flat: Tensor) -> Prompt:
    """Positions of all tokens at this stage, in samples with visual tokens, on the CPU."""
    slot = call.columns.slot_of_position()
    batch, column, text, visual_rows = [], [], [], []
    lengths: list[int] = []
    text_lengths: list[int] = []
    for sample in _samples(call, plan, slot, flat):
        order = torch.full((call.columns.length,), -1)
        order[sample.positions] = torch.arange(len(sample.positions)) + sum(lengths)
        batch.append(torch.full_like(sample.positions, sample.row))
        column.append(slot[sample.row, sample.positions])
        text.append(order[sample.text])
        visual_rows.append(order[sample.visual])
        lengths.append(len(sample.positions))
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
    plan: MethodPlan,
    number: int,
    snapshot: Snapshot,
    flat: Tensor,
    rope: bool,
    queries: str,
    checks: DeferredChecks,
) -> AttentionInputs:
    """Reads a layer and lays out its queries, keys and values over the samples that have visual tokens.

    Args:
        call: The call in progress.
        plan: The method's task in it.
        number: The layer.
        snapshot: Its input.
        flat: `[M]` numbers of the live visual tokens.
        rope: False for queries and keys before rotation; cached keys of earlier calls, which are rotated, are then left
            out.
        queries: "text" or "last".
        checks: Gets the checks that queries and keys are finite.
    """
    probed = snapshot.read(rope)
    device = probed.key.device
    past = _past_keys(call, number, snapshot, probed) if rope else None

    def lay_out() -> _KeyLayout:
        befores = None if past is None else [len(keys) for keys, _ in past]
        return _KeyLayout.of(call, plan, snapshot, flat, queries, befores, device)

    if past is None and _is_uncut(call):
        assert call.visual is not None
        layout = call.visual.cached(("keys", queries, device, _text_key(call)), lay_out)
    else:
        layout = lay_out()
    query, keys, values = [], [], []
    for row, key_slots, query_slots in layout.samples:
        key, value = probed.key[row].transpose(0, 1), probed.value[row].transpose(0, 1)  # [K, G, d]
        if key_slots is not None:
            key, value = key.index_select(0, key_slots), value.index_select(0, key_slots)
        if past is not None:
            key, value = torch.cat([past[row][0].to(key), key]), torch.cat([past[row][1].to(value), value])
        query.append(probed.query[row].transpose(0, 1).index_select(0, query_slots))  # [R, H, d]
        keys.append(key)
        values.append(value)
    queries_, keys_ = _joined(query), _joined(keys)
    if not snapshot.checked:  # rotations do not change whether values are finite
        for x in (queries_, keys_):
            checks.add(x, lambda: _refuse_infinite([row for row, _, _ in layout.samples], query, keys, number))
        snapshot.checked = queries == "text"  # not only the last query
    return AttentionInputs(
        queries=queries_,
        query_offsets=layout.query_offsets,
        query_order=layout.query_order,
        keys=keys_,
        values=_joined(values),
        key_offsets=layout.key_offsets,
        visual=layout.visual,
        scaling=probed.scaling,
        softcap=probed.softcap,
    )


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@dataclass
class _KeyLayout:
    """Slots of a layer's queries and keys; for the other attributes see `AttentionInputs`.

    Attributes:
        samples: For each sample, its row of the batch, the slots of its keys (None for all, in order), and the slots of
            its queries.
    """

    samples: list[tuple[int, Tensor | None, Tensor]]
    query_offsets: Tensor
    query_order: Tensor
    key_offsets: Tensor
    visual: Tensor

    @classmethod
    def of(
        cls,
        call: CallState,
        plan: MethodPlan,
        snapshot: Snapshot,
        flat: Tensor,
        queries: str,
        befores: list[int] | None,
        device: torch.device,
    ) -> _KeyLayout:
        """Lays out the keys of a snapshot, each sample's after its `befores` cached keys of earlier calls."""
        slot = slot_of_position(snapshot.index, snapshot.valid, call.columns.length)
        samples, query_order, visual_rows = [], [], []
        query_lengths: list[int] = []
        key_lengths: list[int] = []
        for sample in _samples(call, plan, slot, flat):
            queried = sample.text if queries == "text" else sample.positions[-1:]
            key_slots = slot[sample.row, sample.positions]
            before = 0 if befores is None else befores[sample.row]
            order = torch.full((call.columns.length,), -1)
            order[sample.positions] = torch.arange(len(key_slots)) + before
            query_order.append(order[queried])
            visual_rows.append(order[sample.visual] + sum(key_lengths))
            query_lengths.append(len(queried))
            key_lengths.append(len(key_slots) + before)
            is_all = len(key_slots) == snapshot.index.shape[1] and torch.equal(key_slots, torch.arange(len(key_slots)))
            places = None if is_all else to_device(key_slots, device)
            samples.append((sample.row, places, to_device(slot[sample.row, queried], device)))
        return cls(
            samples,
            _offsets(query_lengths, device),
            to_device(torch.cat(query_order), device),
            _offsets(key_lengths, device),
            to_device(torch.cat(visual_rows), device),
        )


def _refuse_infinite(rows: list[int], queries: list[Tensor], keys: list[Tensor], number: int) -> None:
    """Raises `MethodError` if queries or keys of a sample hold NaN or Inf, and says of which."""
    pairs = zip(rows, queries, keys, strict=True)
    bad = [str(row) for row, q, k in pairs if not bool(torch.isfinite(q).all() & torch.isfinite(k).all())]
    if bad:
        raise MethodError(
            f"queries or keys of sample {', '.join(bad)} hold NaN or Inf in layer {number}, so attention would be "
            "meaningless; check the embeddings of its text and the image features"
        )


def _past_keys(call: CallState, number: int, snapshot: Snapshot, probed: QKV) -> list[tuple[Tensor, Tensor]] | None:
    """Keys and values `[C, G, d]`, like those probed, of each sample in the slots of a layer that earlier calls filled,
    without padding."""
    cache, state, held = call.columns.cache, call.columns.state, snapshot.cached_tokens
    layer = cache.layers[number] if cache is not None and number < len(cache.layers) else None
    keys = getattr(layer, "keys", None)
    if layer is None or held == 0 or not isinstance(keys, Tensor) or keys.dim() < 4 or layer.is_sliding:
        return None  # a sliding window has lost part of the past; all of it is left out then
    slots = state.slots(number, held) if state is not None else None
    slots = torch.arange(held).expand(call.columns.batch, -1) if slots is None else slots.cpu()
    visible = slots >= 0
    if call.real_past is not None:
        visible = visible & call.real_past.gather(1, slots.clamp(min=0))
    keys, values = keys[:, :, :held], layer.values[:, :, :held]
    if keys.shape[1::2] != probed.key.shape[1::2]:
        keys, values = expanded(snapshot.layer, keys, values)
    return [
        (keys[row][:, seen].transpose(0, 1), values[row][:, seen].transpose(0, 1))
        for row, seen in enumerate(visible.to(keys.device))
    ]


def _offsets(lengths: list[int], device: torch.device) -> Tensor:
    return to_device(torch.tensor([0, *lengths]).cumsum(0), device)
