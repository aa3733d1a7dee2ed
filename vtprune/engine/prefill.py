# SPDX-License-Identifier: Apache-2.0
"""One decoder call: at each stage the method selects tokens, and the others are cut from the layers' inputs.

The decoder is called with the full prompt and makes masks and rotations for all of it. Before each cut that is planned
(`plan`), the methods select (`selection`). From the first one on, every layer gets only the kept positions (`columns`),
with the rotation, position ids and masks of just these (`layer_arguments`). When the decoder returns, its last hidden
state is scattered to the length of the full prompt (`restore`). The same class handles later calls on a pruned cache,
in which nothing is cut and masks have to be translated.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.transfer import to_device
from ..errors import NothingPrunedError, UnsupportedModelError
from ..models.arguments import hidden_states, with_hidden_states
from ..models.attended import attended, attended_columns
from ..models.attention_probe import Projections
from ..models.transformers_names import cache_of
from ..models.visual_tokens import VisualTokens
from ..report.image_source import Source, noted
from ..report.record import PruningRecord
from ..towers.cut import RUNS
from . import checkpointing, gather, kv_cache, readers, token_view
from .cache_state import CacheState
from .call import CallOptions, CallState, Snapshot
from .columns import Columns
from .hooks import is_compiled
from .layer_arguments import LayerArguments
from .plan import Plan, plan_of
from .restore import FullLength
from .selection import select
from .spec import PruneSpec


@dataclass
class HiddenCut:
    """Cuts hidden states down to the positions that are left.

    Attributes:
        slots: `[B, K']` the old slot of each new one.
        merged: Rows and slots `[m]` of tokens that get new states, and the states `[m, D]`; or None.
    """

    slots: Tensor
    merged: tuple[Tensor, Tensor, Tensor] | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """Gathers the slots of `[B, K, D]`, after writing merged states into them.

        Streams of hyper-connections, `[B, K, S, D]` or `[B, K, S * D]`, are copies where states are merged.
        """
        if self.merged is not None:
            rows, slots, states = self.merged
            if states.shape[1:] != hidden.shape[2:]:
                streams = hidden.shape[2:].numel() // states.shape[1]
                states = states.repeat(1, streams).view(len(states), *hidden.shape[2:])
            hidden = hidden.index_put((rows.to(hidden.device), slots.to(hidden.device)), states.to(hidden.dtype))
        return gather.gather(hidden, self.slots, 1)


@dataclass
class LayerCut:
    """A cut before a layer.

    Attributes:
        arguments: The layer's arguments; None if they are those that it was given.
        hidden: Cuts its hidden states; None if nothing was dropped.
        projections: Those of the selection, which the layer need not run again; None if it has to.
    """

    arguments: tuple[tuple, dict] | None
    hidden: HiddenCut | None = None
    projections: Projections | None = None


@dataclass
class DecoderCall(CallState):
    """One call of the decoder: makes the cuts, and gives every layer the arguments for the positions that are left."""

    plan: Plan | None = None

    def __post_init__(self) -> None:
        self.layer_arguments = LayerArguments(self.columns, self.spec.attention_form)
        self.full_length = FullLength(self.columns)
        if self.visual is not None:
            self._follow_plan(self.visual)

    def _follow_plan(self, visual: VisualTokens) -> None:
        self.plan = plan_of(self, visual)
        self.cuts, self.required = self.plan.cuts, self.plan.required
        self.live = visual.cached("live", lambda: torch.ones(len(visual), dtype=torch.bool))
        if self.cuts:
            end, arguments, real = self.options.question_end, self.options.arguments, self.columns.real
            self.answer_starts = readers.answer_starts(end, arguments, real, visual.mask, self.spec.anatomy)

    def before_layer(self, number: int, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Makes the cut before layer `number`, if any, and returns the layer's arguments; None if unchanged."""
        columns = self.columns
        if self.visual is None and self.layer_arguments.stay(args, kwargs):
            columns.record_layer(number)
            return None
        columns.cache = cache_of(kwargs) if columns.cache is None else columns.cache
        if self.differentiable and number and columns.is_cut:
            args, kwargs = self._through(number, args, kwargs)
        cut = LayerCut(None)
        if number in self.cuts:
            started = time.perf_counter()
            cut = self._cut(number, layer, args, kwargs)
            self.selection_time += time.perf_counter() - started
        elif columns.is_modified:
            cut.arguments = self.layer_arguments.of_layer(number, args, kwargs)
        changed = cut.arguments
        if self.differentiable and number == 0 and columns.is_cut and changed is not None:
            changed = self._through(number, *changed)
        if self.plan is not None and number in self.plan.required_layer_inputs:
            self.snapshots[number] = snapshot = Snapshot.take(self, number, layer, *(changed or (args, kwargs)))
            if cut.projections is None and not is_compiled():
                snapshot.watch.start(snapshot.kwargs)
        if changed is not None and checkpointing.runs_hooks_again(layer):
            checkpointing.save_arguments(number, layer, (args, kwargs), changed, cut.hidden)
        columns.record_layer(number)
        if cut.projections is not None and cut.hidden is not None:
            cut.projections.give(hidden_states(args, kwargs).shape[:2], cut.hidden)
        return changed

    def _through(self, number: int, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The arguments, with hidden states that have passed `FullLength.through`."""
        states = hidden_states(args, kwargs)
        if not states.requires_grad:
            return args, kwargs
        return with_hidden_states(args, kwargs, self.full_length.through(number, states))

    def start_reading(self) -> None:
        """Lets the cache's layers take keys and values until `stop_reading`."""
        if self.columns.state is not None:
            self.columns.state.calls.append(None)

    def stop_reading(self) -> None:
        """Lets the cache's layers refuse keys and values again, which models that are not patched would add."""
        if self.columns.state is not None:
            self.columns.state.calls.pop()

    def finish(self, output: Any) -> Any:
        """Scatters the output to the length of the full prompt, and attaches the state of slots to the cache."""
        self.stop_reading()
        if len(self.stages) < len(self.cuts):
            missed = sorted(set(self.cuts) - set(self.stages))
            raise NothingPrunedError(
                f"the method cuts before layer {', '.join(map(str, missed))}, but the decoder returned without calling "
                f"{'it' if len(missed) == 1 else 'them'} as modules, so nothing was cut there; choose other layers, or "
                "report the model"
            )
        ends_prompt = self.visual is not None and self.options.budget.may_drop
        if not (self.columns.is_modified or ends_prompt):
            return output
        if (self.columns.is_cut or ends_prompt) and self.columns.cache is not None:
            state = self.columns.state_after()
            state.ends_in_visual = self.visual is not None and not self.options.generates
            kv_cache.attach(self.columns.cache, state)
            self.caches.recent.append(state)
        return self.full_length.restore(output)

    def recorder(self, evicted: list[Tensor]) -> Callable[[], PruningRecord]:
        """Returns a function that makes the record of this call when `patch.last` is read.

        The function keeps no cache and no pixels, and hidden states only inside `explain.recording()`.

        Args:
            evicted: Columns that left the cache after the call.
        """
        visual, columns, spec = self.visual, self.columns, self.spec
        assert visual is not None
        past, length, slots = columns.past, columns.length, columns.slot_counts
        layout, seconds, inputs = (columns.index, columns.valid, columns.real), self.selection_time, noted(self.inputs)
        kept = [(selection.scores, selection.kept, selection.states) for selection in self.selections]
        cut_layers, budget = self.stages, self.options.budget
        sizes = None if columns.cache is None else kv_cache.layer_sizes(columns.cache, spec.anatomy.num_layers)
        runs = [run for runs in self.recorded.get(RUNS, []) for run in runs]

        def make() -> PruningRecord:
            where = list((visual.position + past).split(visual.counts))
            left = [_positions(visual, past, tokens) for _, tokens, _ in kept]
            stages = list(zip(cut_layers, left, strict=True))
            return PruningRecord(
                visual=where,
                kept=stages[-1][1] if stages else where,
                stages=stages,
                selection_time=seconds,
                method=spec.method_names,
                budget=str(budget),
                columns=past + length,
                slots=slots,
                cached_before=past,
                shape=spec.shape if sizes is None else spec.shape.in_cache(sizes),
                layout=layout,
                places=visual,
                scores=[scores for scores, _, _ in kept],
                kept_flat=[tokens for _, tokens, _ in kept],
                source=Source.of(inputs, spec.anatomy),
                states=[states for _, _, states in kept],
                evicted=evicted,
                work=spec.work,
                text=[int(n) - len(v) for n, v in zip(layout[2].sum(1), where, strict=True)],
                tower_runs=runs,
            )

        return make

    def _cut(self, number: int, layer: nn.Module, args: tuple, kwargs: dict) -> LayerCut:
        """Lets the methods select before layer `number`, and drops the other visual tokens."""
        visual, columns, incoming = self.visual, self.columns, (args, kwargs)
        assert visual is not None
        if columns.is_modified:
            args, kwargs = self.layer_arguments.of_layer(number, args, kwargs)
        snapshot = Snapshot.take(self, number, layer, args, kwargs)
        hidden = snapshot.hidden
        live = self.live.nonzero()[:, 0] if columns.is_cut else token_view.all_tokens(visual)
        selection = select(self, number, live, snapshot)
        self.selections.append(selection)
        self.stages.append(number)
        if selection.merged is None and len(selection.kept) == len(live):
            return LayerCut((args, kwargs) if columns.is_modified else None)
        slot, merged = columns.slot_of_position(), None
        if selection.merged is not None:
            tokens, states = selection.merged
            rows = visual.sample[tokens]
            merged = rows, slot[rows, visual.position[tokens]], states
        self.live = torch.zeros_like(self.live).index_fill_(0, selection.kept, True)
        stays = slot >= 0
        stays.masked_scatter_(visual.mask, self.live)
        slots = columns.keep(stays, incoming[1].get("position_embeddings"))
        self.layer_arguments = LayerArguments(columns, self.spec.attention_form)
        self._cut_records(slots)
        cut = HiddenCut(to_device(slots, hidden.device), merged)
        # All arguments but hidden states come at the length of the full prompt, at every layer.
        arguments = self.layer_arguments.of_layer(number, *with_hidden_states(*incoming, cut(hidden)))
        reuses = merged is None and not (torch.is_grad_enabled() or is_compiled())  # the layer runs next
        return LayerCut(arguments, cut, snapshot.watch.projections if reuses else None)

    def _cut_records(self, slots: Tensor) -> None:
        """Cuts the records of column taps, and DeepStack features, in the same way as the prompt."""
        for name in self.spec.column_taps:
            records = self.recorded.get(name, [])
            self.recorded[name] = [gather.gather(r, to_device(slots, r.device), 1) for r in records]
        if self.deepstack is not None:
            self.deepstack.cut(self.columns.index, self.columns.valid)


def _positions(visual: VisualTokens, past: int, tokens: Tensor) -> list[Tensor]:
    """Positions in the conversation of the given visual tokens `[m]`, for every sample."""
    found = torch.bincount(visual.sample[tokens], minlength=len(visual.counts))
    return list((visual.position[tokens] + past).split(found.tolist()))


def begin(
    spec: PruneSpec,
    options: CallOptions,
    caches: kv_cache.Caches,
    inputs: dict[str, Any],
    kwargs: dict,
    visual: VisualTokens | None,
) -> DecoderCall | None:
    """Creates the state of a call of the decoder, before it runs.

    Args:
        spec: Methods, budget and model of the patch.
        options: Settings of the call.
        caches: The caches that the patch knows.
        inputs: Keyword arguments of the composite's call around it, empty if the decoder was called directly.
        kwargs: Arguments of the decoder, by name.
        visual: The visual tokens to prune, or None.

    Returns:
        DecoderCall: None if the call has nothing to prune and no pruned cache, so that nothing has to be changed.
    """
    cache = cache_of(kwargs)
    state = caches.state_of(cache)
    if visual is None and state is None:
        return None
    given_apart = options.own_budget or not options.may_drop
    if visual is not None and state is not None and not given_apart and spec.window is None:
        _refuse_parts(state, cache)
    batch, length = _shape(kwargs, visual)
    past = kv_cache.length(cache)
    real, real_past, padded, uncut = None, None, False, None
    if visual is not None:  # decoding steps do not need the mask, and reading it would synchronize with the device
        real, real_past = _real_columns(inputs, kwargs, batch, length, past)
        padded = not bool(real.all())
        uncut = visual.cached("uncut", lambda: gather.all_positions(batch, length))
        visual = visual.visible(real) if padded else visual  # visual tokens that the mask hides are padding
    mixing = spec.anatomy.mixes_columns
    columns = Columns((batch, length), real, past, state, cache, spec.renumbers, mixing, padded, uncut)
    call = DecoderCall(spec, options, caches, columns, visual, inputs, real_past, embeds=kwargs.get("inputs_embeds"))
    call.start_reading()
    return call


def _refuse_parts(state: CacheState, cache: Any) -> None:
    """Refuses visual tokens right after a prompt with visual tokens."""
    if state.ends_in_visual and state.length == kv_cache.length(cache):
        raise UnsupportedModelError(
            "this call adds visual tokens right after a prompt with visual tokens, as if one prompt were passed in "
            "several calls, each of which would be pruned by itself; pass the whole prompt in one call, or give "
            "this call a budget of its own inside patch.using(...)"
        )


def _shape(kwargs: dict[str, Any], visual: VisualTokens | None) -> tuple[int, int]:
    """Shape `[B, T]` of a call of the decoder; refuses one that does not fit the positions of the visual tokens."""
    states = kwargs.get("inputs_embeds")
    states = states if states is not None else kwargs.get("input_ids")
    if states is None:
        raise UnsupportedModelError("the decoder was called without input_ids and inputs_embeds; pass one of them")
    batch, length = states.shape[:2]
    if visual is not None and visual.mask.shape != (batch, length):
        raise UnsupportedModelError(
            f"the decoder was called with {batch} x {length} tokens, but the prompt has {tuple(visual.mask.shape)}; "
            "this model changes the length of its prompt, so the positions of visual tokens are unknown"
        )
    return batch, length


def _real_columns(
    inputs: dict[str, Any], kwargs: dict[str, Any], batch: int, length: int, past: int
) -> tuple[Tensor, Tensor | None]:
    """Positions that are not padding, on the CPU: `[B, T]` of this call, and `[B, past]` before it, if known."""
    given = [kwargs.get("attention_mask"), inputs.get("attention_mask")]
    for m in sorted(given, key=lambda m: not (isinstance(m, Tensor) and m.dim() == 2)):
        if not (isinstance(m, Tensor) and m.dim() == 2):
            seen = attended(m, batch, length)
            m = None if seen is None or seen.shape[2] < past + length else attended_columns(seen, past)
        if m is not None and m.shape[1] >= past + length:
            known = m.to("cpu", torch.bool, copy=True).expand(batch, -1)
            if m.shape[1] == length:
                return known, None
            return known[:, past : past + length].clone(), known[:, :past]
    return torch.ones(batch, length, dtype=torch.bool), None
