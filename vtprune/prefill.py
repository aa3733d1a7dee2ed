# SPDX-License-Identifier: Apache-2.0
"""One decoder call, stage by stage: observe, decide, compact.

The decoder itself is called with the full prompt and goes on making masks and rotations for all of it. What changes is
what its layers receive: from the first cut on every layer gets the surviving columns only, with the rotation, positions
and masks of just these columns. When the decoder returns, its last hidden state is put back into the caller's length.
The same object serves later calls on a pruned cache, where nothing is cut and masks have to be translated.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import budget as budgets
from . import compact, decode, observe
from .errors import MethodError, NothingPrunedError, UnsupportedModelError
from .methods.base import AttentionInputs, Prompt, Tokens
from .report import Pruning
from .visual_tokens import VisualTokens

if TYPE_CHECKING:
    from .patching import Patch


@dataclass
class Snapshot:
    """A layer's input as it was when the layer was about to run, and how many slots its cache held then."""

    layer: nn.Module
    args: tuple
    kwargs: dict[str, Any]
    index: Tensor
    alive: Tensor
    held: int


@dataclass
class Pools:
    """The visual tokens of a call, grouped as the method's budget asks.

    Attributes:
        of_token: `[M]` pool number of each visual token.
        sizes: Tokens in each pool.
        groups: For each sample that has visual tokens, the numbers of its pools.
    """

    of_token: Tensor
    sizes: list[int]
    groups: list[list[int]]

    @classmethod
    def of(cls, visual: VisualTokens, by: str) -> Pools:
        new = torch.ones(len(visual), dtype=torch.bool)
        new[1:] = visual.sample.diff() != 0
        if by == "image":
            new[1:] |= visual.image.diff() != 0
        of_token = new.cumsum(0) - 1
        sizes = torch.bincount(of_token).tolist()
        samples = visual.sample[new].tolist()
        groups: dict[int, list[int]] = {}
        for pool, sample in enumerate(samples):
            groups.setdefault(sample, []).append(pool)
        return cls(of_token, sizes, list(groups.values()))


@dataclass
class Planes:
    """Features that the decoder adds to visual columns after its first layers (DeepStack).

    The decoder holds on to the mask and the list it was given, so both are ours and are changed in place at a cut.
    """

    mask: Tensor
    full: Tensor
    embeds: list[Tensor]
    originals: list[Tensor]

    def cut(self, index: Tensor, alive: Tensor) -> None:
        """Makes mask and features those of the packed columns `index`, `alive` (`[B, K]`, CPU)."""
        full = self.full.cpu()
        rank = (full.flatten().cumsum(0) - 1).view(full.shape)
        picked = full.gather(1, index) & alive
        rows = rank.gather(1, index)[picked]
        self.mask.set_(picked.to(self.mask.device))
        for i, original in enumerate(self.originals):
            self.embeds[i] = original.index_select(0, rows.to(original.device))


@dataclass
class DecoderCall:
    """State of one call of the decoder.

    Attributes:
        patch: Whose method and budget apply.
        batch, length: Shape `[B, T]` of the call.
        past: Columns of the conversation before this call.
        real: `[B, T]` bool, False for padding.
        real_past: `[B, past]` bool or None, the same for columns in the cache.
        state: Slots of a cache that was pruned by an earlier call.
        visual: The visual columns, or None where nothing is to be cut.
        inputs: Keyword arguments of the composite's call.
        memo: Kept tokens and merged states per stage, from an earlier call without a cache that this one continues.
    """

    patch: Patch
    batch: int
    length: int
    past: int
    real: Tensor
    real_past: Tensor | None
    state: decode.CacheState | None
    visual: VisualTokens | None
    inputs: dict[str, Any]
    cache: Any = None
    memo: list[tuple[Tensor, Tensor | None]] | None = None
    planes: Planes | None = None
    observed: dict[str, list] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.index = torch.arange(self.length).expand(self.batch, -1)
        self.alive = torch.ones(self.batch, self.length, dtype=torch.bool)
        self.is_cut, self.ragged = False, False
        self.packings: list[tuple[Tensor, Tensor]] = []  # of every layer that ran
        self.snapshots: dict[int, Snapshot] = {}
        self.stages: list[tuple[int, list[Tensor]]] = []
        self.kept_flat: list[Tensor] = []
        self.decisions: list[tuple[Tensor, Tensor | None]] = []
        self.scores: list[Tensor | None] = []
        self.counts: dict[int, list[int]] = {}
        self.reads: set[int] = set()
        self._gathered: dict[Any, Any] = {}
        self._slots: dict[Any, tuple[Tensor, Tensor, bool]] = {}
        if self.visual is not None:
            self._plan(self.visual)

    def _plan(self, visual: VisualTokens) -> None:
        patch = self.patch
        self.alive_visual = torch.ones(len(visual), dtype=torch.bool)
        self.pools = Pools.of(visual, patch.method.pool)
        plan = budgets.plan(patch.budget, patch.schedule, patch.anatomy.num_layers, self.pools.sizes, self.pools.groups)
        if plan[-1] == self.pools.sizes:
            if patch.budget.asks_to_drop:
                raise NothingPrunedError(
                    f"{patch.budget} of {sum(self.pools.sizes)} visual tokens (pools of {self.pools.sizes}) rounds to all of "
                    "them, so nothing would be dropped; use a smaller ratio, or keep=, which may exceed what is there"
                )
            return
        self.counts = {stage.layer: count for stage, count in zip(patch.schedule, plan, strict=True)}
        self.reads = set(patch.method.reads(patch.anatomy.num_layers))

    # --- what the hooks call ------------------------------------------------------------------------------------------

    def before_layer(self, number: int, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Cuts if a stage stands here, and gives the layer the arguments of the surviving columns."""
        self.cache = next((v for v in kwargs.values() if hasattr(v, "get_mask_sizes")), self.cache)
        if number in self.counts:
            started = time.perf_counter()
            changed = self._cut(number, layer, args, kwargs)
            self.seconds += time.perf_counter() - started
        elif self.is_cut or self.state is not None:
            changed = self._arguments(number, args, kwargs)
        else:
            changed = None
        if number in self.reads:
            now_args, now_kwargs = changed if changed is not None else (args, kwargs)
            held = decode.held(self.cache, number)
            self.snapshots[number] = Snapshot(layer, now_args, now_kwargs, self.index, self.alive, held)
        self.packings.append((self.index, self.alive))
        return changed

    def finish(self, output: Any) -> Any:
        """Puts hidden states back into the caller's length and leaves the slots with the cache."""
        if self.is_cut:
            output = self._restore(output)
            if self.cache is not None:
                decode.attach(self.cache, decode.CacheState(self._bases(), self.past + self.length))
        return output

    def pruning(self) -> Pruning:
        """The account of this call."""
        assert self.visual is not None
        visual = self.visual
        columns = list((visual.column + self.past).split(visual.counts))
        kept = self.stages[-1][1] if self.stages else columns
        return Pruning(
            visual=columns,
            kept=kept,
            stages=self.stages,
            seconds=self.seconds,
            method=self.patch.method.name or type(self.patch.method).__name__,
            budget=str(self.patch.budget),
            columns=self.past + self.length,
            slots=[int(a.shape[1]) for _, a in self.packings],
            held_before=self.past,
            shape=self.patch.shape,
            places=visual,
            scores=self.scores,
            kept_flat=self.kept_flat,
        )

    # --- the cut ------------------------------------------------------------------------------------------------------

    def _cut(self, number: int, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        visual = self.visual
        assert visual is not None
        incoming = (args, kwargs)  # all but the hidden states still have the caller's length
        if self.is_cut or self.state is not None:
            args, kwargs = self._arguments(number, args, kwargs)
        hidden = _hidden(args, kwargs)
        keep, merged = self._decide(number, layer, hidden, args, kwargs)
        flat = self.alive_visual.nonzero()[:, 0]  # numbers of the tokens that were alive
        slot = self._slot_of_column(self.index, self.alive)
        if merged is not None:
            rows, slots = visual.sample[flat], slot[visual.sample[flat], visual.column[flat]]
            hidden = hidden.index_put((rows.to(hidden.device), slots.to(hidden.device)), merged.to(hidden.dtype))
        self.alive_visual[flat[~keep]] = False
        stays = slot >= 0
        stays[visual.sample, visual.column] &= self.alive_visual
        relative = self._repack(stays, slot)
        self._record(number, merged)
        hidden = compact.gather(hidden, relative.to(hidden.device), 1)
        return self._arguments(number, *_with_hidden(*incoming, hidden))

    def _repack(self, stays: Tensor, slot: Tensor) -> Tensor:
        """Goes over to the columns `stays` `[B, T]`; returns for each new slot the old one, `[B, K]`."""
        self.index, self.alive = compact.pack(stays, self.real)
        self.is_cut, self.ragged = True, not bool(self.alive.all())
        self._gathered.clear()
        self._slots.clear()
        relative = slot.gather(1, self.index).clamp(min=0)
        for name in self.patch.column_taps:
            records = self.observed.get(name, [])
            self.observed[name] = [compact.gather(r, relative.to(r.device), 1) for r in records]
        if self.planes is not None:
            self.planes.cut(self.index, self.alive)
        return relative

    def _decide(
        self, number: int, layer: nn.Module, hidden: Tensor, args: tuple, kwargs: dict
    ) -> tuple[Tensor, Tensor | None]:
        """Asks the method which of the live visual tokens stay: `[M']` bool on the CPU, and merged states if any."""
        stage = len(self.stages)
        flat = self.alive_visual.nonzero()[:, 0]
        pools = self.pools.of_token[flat]
        sizes = torch.bincount(pools, minlength=len(self.pools.sizes))
        wanted = torch.tensor(self.counts[number])
        if self.memo is not None:
            kept, merged = self.memo[stage]
            keep = torch.zeros_like(self.alive_visual)
            keep[kept] = True
            self.scores.append(None)
            return keep[flat], merged
        if torch.equal(sizes, wanted):
            self.scores.append(None)
            return torch.ones(len(flat), dtype=torch.bool), None
        with torch.no_grad():
            tokens = self._tokens(number, stage, flat, sizes, wanted, hidden, args, kwargs, layer)
            choice = self.patch.method.choose(tokens)
        keep = choice.keep.cpu()
        got = torch.bincount(pools[keep], minlength=len(self.pools.sizes))
        if keep.shape != flat.shape or not torch.equal(got, wanted):
            raise MethodError(
                f"{type(self.patch.method).__name__} kept {got.tolist()} tokens of its pools before layer {number}; the budget "
                f"is {wanted.tolist()}"
            )
        self.scores.append(None if choice.scores is None else choice.scores.detach().float().cpu())
        return keep, choice.hidden

    def _tokens(
        self,
        number: int,
        stage: int,
        flat: Tensor,
        sizes: Tensor,
        wanted: Tensor,
        hidden: Tensor,
        args: tuple,
        kwargs: dict,
        layer: nn.Module,
    ) -> Tokens:
        visual = self.visual
        assert visual is not None
        device = hidden.device
        slot = self._slot_of_column(self.index, self.alive)[visual.sample[flat], visual.column[flat]]
        rows = visual.sample[flat]
        states = hidden[rows.to(device), slot.to(device)]  # [M', D]
        if not bool(torch.isfinite(states).all()):
            bad = sorted({int(s) for s in rows[~torch.isfinite(states).all(-1).cpu()]})
            raise MethodError(
                f"visual tokens of sample {', '.join(map(str, bad))} hold NaN or Inf before layer {number}: scores would be "
                "meaningless; check the image features"
            )
        here = Snapshot(layer, args, kwargs, self.index, self.alive, decode.held(self.cache, number))

        def read(tokens: Tokens, which: int, rope: bool, queries: str) -> AttentionInputs:
            if which != number and which not in self.snapshots:
                raise MethodError(
                    f"the input of layer {which} was not kept; name it in the `reads` of {type(self.patch.method).__name__}"
                )
            return self._attention_inputs(which, self.snapshots.get(which, here), flat, rope, queries)

        observed = {
            name: [r[rows.to(r.device), slot.to(r.device)] for r in records] if name in self.patch.column_taps else records
            for name, records in self.observed.items()
        }
        places = {n: getattr(visual, n)[flat].to(device) for n in ("sample", "image", "frame", "crop", "row", "col", "index", "feature")}
        return Tokens(
            hidden=states,
            segments=torch.cat([sizes.new_zeros(1), sizes.cumsum(0)]).to(device),
            budgets=wanted.to(device),
            originals=torch.tensor(self.pools.sizes, device=device),
            column=visual.column[flat].to(device),
            layer=number,
            stage=stage,
            num_layers=self.patch.anatomy.num_layers,
            observed=observed,
            inputs=self.inputs,
            anatomy=self.patch.anatomy,
            memory=self.memory,
            prompt=self._prompt(flat).to(device),
            reader=read,
            **places,
        )

    def _prompt(self, flat: Tensor) -> Prompt:
        """Where every token of the samples with visual tokens stands at this stage."""
        visual = self.visual
        assert visual is not None
        slot = self._slot_of_column(self.index, self.alive)
        batch, columns, lengths, texts, text_lengths, visual_rows = [], [], [], [], [], []
        offset = 0
        for b in [b for b, n in enumerate(visual.counts) if n]:
            here, asked = self._text(b, slot[b], "text")
            order = torch.full((self.length,), -1)
            order[here] = torch.arange(len(here)) + offset
            batch.append(torch.full((len(here),), b))
            columns.append(slot[b, here])
            lengths.append(len(here))
            texts.append(order[asked])
            text_lengths.append(len(asked))
            visual_rows.append(order[visual.column[flat[visual.sample[flat] == b]]])
            offset += len(here)
        cpu = torch.device("cpu")
        return Prompt(
            batch=torch.cat(batch),
            column=torch.cat(columns),
            segments=_offsets(lengths, cpu),
            visual=torch.cat(visual_rows),
            text=torch.cat(texts),
            text_segments=_offsets(text_lengths, cpu),
        )

    def _text(self, b: int, slot: Tensor, queries: str) -> tuple[Tensor, Tensor]:
        """Columns of sample `b` that hold a token, and those of the query rows among them."""
        visual = self.visual
        assert visual is not None
        here = ((slot >= 0) & self.real[b]).nonzero()[:, 0]
        text = here[(here > visual.column[visual.sample == b].max()) & ~visual.mask[b, here]]
        return here, text if queries == "text" and len(text) else here[-1:]

    def _attention_inputs(
        self, number: int, snapshot: Snapshot, flat: Tensor, rope: bool, queries: str
    ) -> AttentionInputs:
        """Flattens what a probe of `snapshot` returns over the samples that have visual tokens."""
        visual = self.visual
        assert visual is not None
        probed = observe.probe(snapshot.layer, snapshot.args, snapshot.kwargs, rope)
        device = probed.key.device
        past = self._past_keys(number, snapshot.held) if rope else None
        slot = self._slot_of_column(snapshot.index, snapshot.alive)
        query_rows, query_order, visual_rows = [], [], []
        keys, values, query_lengths, key_lengths = [], [], [], []
        offset = 0
        for b in [b for b, n in enumerate(visual.counts) if n]:
            columns, asked = self._text(b, slot[b], queries)
            here = slot[b, columns].to(device)
            key, value = probed.key[b][:, here].transpose(0, 1), probed.value[b][:, here].transpose(0, 1)  # [C, G, d]
            before = 0
            if past is not None:
                key = torch.cat([past[b][0].to(key), key])
                value = torch.cat([past[b][1].to(value), value])
                before = len(past[b][0])
            order = torch.full((self.length,), -1)
            order[columns] = torch.arange(len(columns)) + before
            query_rows.append(probed.query[b][:, slot[b, asked].to(device)].transpose(0, 1))  # [R, H, d]
            query_order.append(order[asked])
            visual_rows.append(order[visual.column[flat[visual.sample[flat] == b]]] + offset)
            keys.append(key)
            values.append(value)
            query_lengths.append(len(asked))
            key_lengths.append(len(key))
            offset += len(key)
        return AttentionInputs(
            queries=torch.cat(query_rows),
            query_segments=_offsets(query_lengths, device),
            query_order=torch.cat(query_order).to(device),
            keys=torch.cat(keys),
            values=torch.cat(values),
            key_segments=_offsets(key_lengths, device),
            visual=torch.cat(visual_rows).to(device),
            scaling=probed.scaling,
            softcap=probed.softcap,
        )

    def _past_keys(self, number: int, held: int) -> list[tuple[Tensor, Tensor]] | None:
        """Keys and values of the `held` slots that earlier calls left in a layer, `[C, G, d]` per sample, without padding."""
        count = min(held, self._stored(number))
        if count == 0:
            return None
        layer = self.cache.layers[number]
        slots = self.state.slots(number, count) if self.state is not None else None
        if slots is None:
            slots = torch.arange(count).expand(self.batch, -1)
        slots = slots.cpu()
        visible = slots >= 0
        if self.real_past is not None:
            visible = visible & self.real_past.gather(1, slots.clamp(min=0))
        return [
            (layer.keys[b][:, :count][:, v].transpose(0, 1), layer.values[b][:, :count][:, v].transpose(0, 1))
            for b, v in enumerate(visible.to(layer.keys.device))
        ]

    def _stored(self, number: int) -> int:
        """Slots of a cache layer that hold keys: a sliding window forgets, and then the past is left out."""
        layer = self.cache.layers[number] if self.cache is not None and number < len(self.cache.layers) else None
        if layer is None or getattr(layer, "keys", None) is None or layer.keys.dim() < 4:
            return 0
        return 0 if layer.is_sliding else layer.keys.shape[-2]

    def _record(self, number: int, merged: Tensor | None) -> None:
        visual = self.visual
        assert visual is not None
        self.kept_flat.append(self.alive_visual.nonzero()[:, 0])
        self.decisions.append((self.kept_flat[-1], merged))
        columns, alive = (visual.column + self.past).split(visual.counts), self.alive_visual.split(visual.counts)
        self.stages.append((number, [c[a] for c, a in zip(columns, alive, strict=True)]))

    # --- arguments of the surviving columns -----------------------------------------------------------------------------

    def _slot_of_column(self, index: Tensor, alive: Tensor) -> Tensor:
        """`[B, T]` slot of each prompt column, -1 for dropped ones."""
        slot = torch.full((self.batch, self.length + 1), -1)
        slot.scatter_(1, torch.where(alive, index, self.length), torch.arange(index.shape[1]).expand_as(index))
        return slot[:, : self.length]

    def _arguments(self, number: int, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        mask_names = [n for n, v in kwargs.items() if "mask" in n or _is_block_mask(v)]
        rest = {n: v for n, v in kwargs.items() if n not in mask_names and n != "hidden_states"}
        new_kwargs = dict(kwargs)
        if self.is_cut:
            new_kwargs.update({n: compact.map_tensors(v, self._columns) for n, v in rest.items()})
        for name in mask_names:
            new_kwargs[name] = self._mask(number, kwargs[name])
        new_args = [self._positional(number, a) for a in args[1:]]
        return (*args[:1], *new_args), new_kwargs

    def _positional(self, number: int, value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() == 4 and value.shape[2] == self.length:
            return self._mask(number, value)
        return compact.map_tensors(value, self._columns) if self.is_cut else value

    def _columns(self, x: Tensor) -> Tensor:
        """Gathers the surviving columns of a tensor that has all of them."""
        dim = compact.column_dim(x, self.batch, self.length)
        if dim is None:
            return x
        known = self._gathered.get(id(x))
        if known is None or known[0] is not x:
            known = (x, compact.gather(x, self._on(self.index, x.device), dim))
            self._gathered[id(x)] = known
        return known[1]

    def _on(self, tensor: Tensor, device: torch.device) -> Tensor:
        key = (id(tensor), device)
        if key not in self._gathered:
            self._gathered[key] = (tensor, tensor.to(device))
        return self._gathered[key][1]

    def _mask(self, number: int, mask: Any) -> Any:
        if mask is None and not self.ragged and not (self.state is not None and self.state.is_ragged(number)):
            return None
        slots, alive, plain = self._layer_slots(number)
        if mask is None:
            return self._causal(slots, alive) if not plain else None
        key = (id(mask), id(slots))
        known = self._gathered.get(key)
        if known is None or known[0] is not mask:
            known = (mask, self._translated(mask, slots, alive), slots)
            self._gathered[key] = known
        return known[1]

    def _translated(self, mask: Any, slots: Tensor, alive: Tensor) -> Any:
        if _is_block_mask(mask):
            return _translate_block_mask(mask, self.index if self.is_cut else None, self.past, slots, alive)
        if mask.dim() == 2 and mask.shape[1] == self.length and self.past:
            slots, alive = self.index, self.alive
        rows = self._on(self.index, mask.device) if self.is_cut else None
        return compact.translate_mask(mask, rows, self._on(slots, mask.device), self._on(alive, mask.device))

    def _causal(self, slots: Tensor, alive: Tensor) -> Any:
        """What None stood for, where some slots must not be seen, in the form that the attention function takes."""
        key = ("causal", id(slots))
        if key not in self._gathered:
            form = self.patch.attention
            device = self.patch.device
            mask: Any = alive.to(device)
            if "flash" not in form:
                mask = compact.causal_mask(self.index.to(device) + self.past, slots.to(device), mask)
            if form == "eager":
                dtype = self.patch.dtype
                mask = torch.zeros(mask.shape, dtype=dtype, device=device).masked_fill(~mask, torch.finfo(dtype).min)
            elif form == "flex_attention":
                mask = _block_mask(mask)
            self._gathered[key] = (slots, mask)
        return self._gathered[key][1]

    def _layer_slots(self, number: int) -> tuple[Tensor, Tensor, bool]:
        """Columns `[B, k]` in the KV slots that layer `number` will attend to, which of them are alive, and whether all are."""
        held = decode.held(self.cache, number)
        base = self.state.base[number] if self.state is not None and number < len(self.state.base) else None
        queries = self.index.shape[1]
        count, start = held + queries, 0
        if self.cache is not None and number < len(self.cache.layers):
            sizes = getattr(self.cache.layers[number], "get_mask_sizes", None)
            count, start = map(int, sizes(queries)) if sizes is not None else (count, start)
        key = (id(base), held, count, start)
        if key not in self._slots:
            self._slots[key] = self._make_slots(number, held, count, start)
        return self._slots[key]

    def _make_slots(self, number: int, held: int, count: int, start: int) -> tuple[Tensor, Tensor, bool]:
        slots = self.state.slots(number, held) if self.state is not None else None
        slots = torch.arange(held).expand(self.batch, -1) if slots is None else slots
        slots = torch.cat([slots, torch.where(self.alive, self.index + self.past, -1)], 1)[:, start : start + count]
        plain = not bool((slots < 0).any())
        if slots.shape[1] < count:  # a static cache shows its empty slots too
            slots = nn.functional.pad(slots, (0, count - slots.shape[1]), value=-1)
        return slots.clamp(min=0), slots >= 0, plain

    def _bases(self) -> list[Tensor | None]:
        """Slots of every layer after this call, for the cache to keep."""
        made: dict[Any, Tensor | None] = {}
        bases: list[Tensor | None] = []
        for number, (index, alive) in enumerate(self.packings):
            old = self.state.base[number] if self.state is not None else None
            held = decode.held(self.cache, number) - index.shape[1]
            key = (id(index), id(old), held)
            if key not in made:
                if old is None and index.shape[1] == self.length and bool(alive.all()):
                    made[key] = None
                else:
                    before = self.state.slots(number, held) if self.state is not None else None
                    before = torch.arange(max(held, 0)).expand(self.batch, -1) if before is None else before
                    made[key] = torch.cat([before, torch.where(alive, index + self.past, -1)], 1)
            bases.append(made[key])
        return bases

    # --- back to the caller's length --------------------------------------------------------------------------------------

    def _restore(self, output: Any) -> Any:
        if isinstance(output, Tensor):
            return self._full(output, -1)
        if isinstance(output, tuple):
            return (self._full(output[0], -1), *output[1:])
        output.last_hidden_state = self._full(output.last_hidden_state, -1)
        hidden = getattr(output, "hidden_states", None)
        if hidden is not None:
            # Entry 0 is the input of the first layer, entry i + 1 the output of layer i.
            output.hidden_states = tuple(
                None if h is None else self._full(h, max(i - 1, 0)) for i, h in enumerate(hidden)
            )
        return output

    def _full(self, x: Tensor, layer: int) -> Tensor:
        index, alive = self.packings[layer]
        if x.dim() < 3 or x.shape[1] != index.shape[1]:
            return x
        if index.shape[1] == self.length and bool(alive.all()):
            return x
        return compact.scatter(x, index.to(x.device), alive.to(x.device), self.length)


def begin(patch: Patch, inputs: dict[str, Any] | None, args: tuple, kwargs: dict, visual: VisualTokens | None) -> DecoderCall | None:
    """Looks at a call of the decoder.

    Args:
        patch: Whose hooks were called.
        inputs: Keyword arguments of the composite's call around it, None if the decoder was called directly.
        args, kwargs: Arguments of the decoder.
        visual: The visual columns to prune, or None.

    Returns:
        DecoderCall: None if the call has nothing to prune and no pruned cache: then it passes untouched.
    """
    cache = next((v for v in kwargs.values() if hasattr(v, "get_mask_sizes")), None)
    state = decode.state_of(cache)
    if visual is None and state is None:
        return None
    states = kwargs.get("inputs_embeds")
    states = states if states is not None else kwargs.get("input_ids", args[0] if args else None)
    if states is None:
        raise UnsupportedModelError("the decoder was called without input_ids and inputs_embeds")
    batch, length = states.shape[:2]
    if visual is not None and visual.mask.shape != (batch, length):
        raise UnsupportedModelError(
            f"the decoder was given {batch} x {length} columns, but the prompt has {tuple(visual.mask.shape)}: this model "
            "changes the length of its prompt, and vtprune cannot tell which columns are visual"
        )
    past = decode.length(cache)
    real, real_past = _real_columns(inputs or {}, kwargs, batch, length, past)
    return DecoderCall(
        patch=patch,
        batch=batch,
        length=length,
        past=past,
        real=real,
        real_past=real_past,
        state=state,
        visual=visual,
        inputs=inputs or {},
        cache=cache,
    )


def own_planes(call: DecoderCall, kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """Replaces DeepStack arguments by copies that a cut may change: a mask `[B, T]` and lists of `[visual columns, D]`."""
    shape = (call.batch, call.length)
    masks = {
        n: v for n, v in kwargs.items() if isinstance(v, Tensor) and v.dtype == torch.bool and v.shape == shape and n != "attention_mask"
    }
    lists = {n: v for n, v in kwargs.items() if isinstance(v, list) and v and all(isinstance(t, Tensor) for t in v)}
    if len(masks) != 1 or len(lists) != 1:
        return None
    (mask_name, mask), (list_name, embeds) = *masks.items(), *lists.items()
    call.planes = Planes(mask.clone(), mask, list(embeds), list(embeds))
    return {**kwargs, mask_name: call.planes.mask, list_name: call.planes.embeds}


def _real_columns(
    inputs: dict[str, Any], kwargs: dict[str, Any], batch: int, length: int, past: int
) -> tuple[Tensor, Tensor | None]:
    """Which columns are not padding: `[B, T]` of this call and, where known, `[B, past]` before it. On the CPU."""
    masks = [kwargs.get("attention_mask"), inputs.get("attention_mask")]
    for mask in masks:
        if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] >= past + length:
            known = mask[:, : past + length].bool().cpu().expand(batch, -1)
            return known[:, past:].clone(), known[:, :past]
    for mask in masks:
        if isinstance(mask, dict):
            mask = mask.get("full_attention", next(iter(mask.values()), None))
        if isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[-1] >= past + length:
            seen = (mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2)[:, 0].any(1)
            known = seen[:, : past + length].cpu().expand(batch, -1)
            return known[:, past:].clone(), known[:, :past]
    return torch.ones(batch, length, dtype=torch.bool), None


def _hidden(args: tuple, kwargs: dict) -> Tensor:
    return kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]


def _with_hidden(args: tuple, kwargs: dict, hidden: Tensor) -> tuple[tuple, dict]:
    if "hidden_states" in kwargs:
        return args, {**kwargs, "hidden_states": hidden}
    return (hidden, *args[1:]), kwargs


def _offsets(lengths: list[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(device)


def _is_block_mask(value: Any) -> bool:
    return type(value).__name__ == "BlockMask"


def _translate_block_mask(mask: Any, rows: Tensor | None, past: int, slots: Tensor, alive: Tensor) -> Any:
    """Flex attention: the old pattern, asked at the columns behind the new rows and slots."""
    from torch.nn.attention.flex_attention import create_block_mask

    device = mask.kv_num_blocks.device
    slots, alive = slots.to(device), alive.to(device)
    rows = torch.arange(mask.seq_lengths[0]).expand(slots.shape[0], -1) if rows is None else rows
    rows = rows.to(device)
    pattern = mask.mask_mod

    def translated(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return pattern(b, h, rows[b, q], slots[b, kv]) & alive[b, kv]

    return create_block_mask(translated, slots.shape[0], None, rows.shape[1], slots.shape[1], device=str(device))


def _block_mask(allowed: Tensor) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def pattern(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return allowed[b, 0, q, kv]

    return create_block_mask(pattern, allowed.shape[0], None, *allowed.shape[2:], device=str(allowed.device))
