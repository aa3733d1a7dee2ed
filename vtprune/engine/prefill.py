# SPDX-License-Identifier: Apache-2.0
"""One decoder call: at each stage the method selects tokens, and the others are cut from the layers' inputs.

The decoder is called with the full prompt and makes masks and rotations for all of it. From the first cut on, every
layer gets only the kept positions, with the rotation, position ids and masks of just these (`columns`). When the
decoder returns, its last hidden state is scattered to the length of the full prompt. The same class handles later calls
on a pruned cache, in which nothing is cut and masks have to be translated.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..core import budget as budgets
from ..core.lent import Lent
from ..core.log import warn_once
from ..core.method import Choice, Method, ScoreMethod, check_choice, name_of
from ..core.tokens import Tokens
from ..core.transfer import DeferredChecks, to_device
from ..errors import MethodError, NothingPrunedError, UnsupportedModelError
from ..models.arguments import hidden_states, with_hidden_states
from ..models.attended import attended
from ..models.transformers_names import cache_of
from ..models.visual_tokens import VisualTokens
from ..report import explain
from ..report.image_source import Source, noted
from ..report.record import PruningRecord
from ..towers.cut import RUNS
from . import checkpointing, gather, kv_cache, readers, token_view
from .call import BudgetGroups, CallOptions, CallState, MethodCall, Selection, Snapshot
from .columns import Columns
from .hooks import is_compiled
from .layer_arguments import LayerArguments
from .restore import FullLength
from .spec import MethodUse, PruneSpec


@dataclass
class DecoderCall(CallState):
    """One call of the decoder: makes the cuts, and gives every layer the arguments for the positions that are left."""

    required_layer_inputs: set[int] = field(default_factory=set)
    cut_hidden: Callable[[Tensor], Tensor] | None = None  # cuts hidden states down, if there is a cut before this layer
    give: Callable[[], None] | None = None  # passes projections computed for the selection on to the next layer
    trains: bool = False  # whether gradients are wanted of what the present cut receives
    selects: bool = False  # whether a method is selecting tokens

    def __post_init__(self) -> None:
        self.layer_arguments = LayerArguments(self.columns, self.spec.attention_form)
        self.full_length = FullLength(self.columns)
        if self.visual is not None:
            self._plan(self.visual)

    def _plan(self, visual: VisualTokens) -> None:
        arguments, budget = self.options.arguments, self.options.budget
        self.live = visual.cached("live", lambda: torch.ones(len(visual), dtype=torch.bool))
        asked = readers.positions_asked(arguments) if self.spec.anatomy.padding_id is None else None
        if asked is None or budget.auto is not None:
            self.required, plans = self._plans(visual)
        else:
            self.required, plans = visual.cached(("plan", self.spec, budget, asked), lambda: self._plans(visual))
        for use, groups, counts in plans:
            call = MethodCall(use, groups, counts)
            for layer in counts:
                self.cuts.setdefault(layer, []).append(call)
            self.required_layer_inputs |= set(use.method.required_layer_inputs(self.spec.anatomy.num_layers))
        if self.cuts:
            end, real = self.options.question_end, self.columns.real
            self.answer_starts = readers.answer_starts(end, arguments, real, visual.mask, self.spec.anatomy)

    def _plans(self, visual: VisualTokens) -> tuple[Tensor | None, list[tuple[MethodUse, BudgetGroups, dict]]]:
        """`required`, and for every method that prunes: its budget groups, and their counts by the layer of the cut."""
        layers, arguments, budget = self.spec.anatomy.num_layers, self.options.arguments, self.options.budget
        read = readers.read_columns(arguments, self.columns.real, self.spec.anatomy) & visual.mask
        required = read[visual.sample, visual.position] if bool(read.any()) else None
        groups, plans = self._groups(visual), []
        # Required tokens count in the budget, and exceed it if necessary.
        least = None if required is None else [g.count(required.nonzero()[:, 0]) for _, g in groups]
        lasts = self._last_counts(visual, [g for _, g in groups], least)
        for number, ((use, members), last) in enumerate(zip(groups, lasts, strict=True)):
            plan = budgets.plan(budget, use.schedule, layers, members.sizes, [*members.by_sample.values()], last)
            if least is not None:
                needed = least[number]
                readers.warn_of_labels(arguments, sum(needed), sum(plan[-1]))
                plan = [[max(pair) for pair in zip(counts, needed, strict=True)] for counts in plan]
            if plan[-1] != members.sizes:
                plans.append((use, members, {s.layer: count for s, count in zip(use.schedule, plan, strict=True)}))
        return required, plans

    def _groups(self, visual: VisualTokens) -> list[tuple[MethodUse, BudgetGroups]]:
        """The methods that have tokens to prune in this call, and their budget groups."""
        if len(self.spec.uses) == 1:
            use, by = self.spec.uses[0], self.spec.method.group
            everything = token_view.all_tokens(visual)
            groups = visual.cached(("groups", by), lambda: BudgetGroups.of(visual, by, everything))
            return [(use, groups)] if len(everything) else []
        uses = [(use, use.members(visual.kind)) for use in self.spec.uses]
        return [(use, BudgetGroups.of(visual, use.method.group, rows)) for use, rows in uses if len(rows)]

    def _last_counts(
        self, visual: VisualTokens, groups: list[BudgetGroups], least: list[list[int]] | None
    ) -> list[list[int] | None]:
        """Final count of each method's groups, for budgets that are not the same share of every group; else None.

        `least` are the tokens of each group that have to stay.
        """
        auto = self.options.budget.auto
        if auto is None:
            return _split_keep(self.options.budget, groups, least)
        pictures = BudgetGroups.of(visual, "image", torch.arange(len(visual)))
        offsets = torch.tensor([0, *pictures.sizes]).cumsum(0)
        counts = torch.tensor(auto.counts(self._features(visual), offsets))
        last: list[list[int] | None] = []
        for members in groups:
            group = members.of_token[offsets[:-1]]
            of_others = group < 0
            total = torch.zeros(len(members.sizes) + 1, dtype=torch.int64)
            total.index_add_(0, torch.where(of_others, len(members.sizes), group), counts)
            last.append(total[:-1].tolist())
        return last

    @torch.no_grad()
    def _features(self, visual: VisualTokens) -> Tensor:
        """Features `[M, D]` of the visual tokens in the decoder's input; zero for tokens without a place in an image
        (unless none has one)."""
        if self.embeds is None:
            raise UnsupportedModelError(
                'ratio="auto" reads the visual features in inputs_embeds of the decoder, and this call passed none; '
                "use a fixed ratio"
            )
        sample, position = (to_device(t, self.embeds.device) for t in (visual.sample, visual.position))
        features, placed = self.embeds[sample, position], visual.grid_row >= 0
        return features * to_device(placed, features.device)[:, None] if bool(placed.any()) else features

    def before_layer(self, number: int, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Makes the cut before layer `number`, if any, and returns the layer's arguments; None if unchanged."""
        columns = self.columns
        if self.visual is None and self.layer_arguments.stay(args, kwargs):
            columns.record_layer(number)
            return None
        columns.cache = cache_of(kwargs) if columns.cache is None else columns.cache
        changed, self.cut_hidden = None, None
        if self.differentiable and number and columns.is_cut:
            args, kwargs = self._through(number, args, kwargs)
        if number in self.cuts:
            started = time.perf_counter()
            changed = self._cut(number, layer, args, kwargs)
            self.selection_time += time.perf_counter() - started
        elif columns.is_modified:
            changed = self.layer_arguments.of_layer(number, args, kwargs)
        if self.differentiable and number == 0 and columns.is_cut and changed is not None:
            changed = self._through(number, *changed)
        if number in self.required_layer_inputs:
            self.snapshots[number] = snapshot = Snapshot.take(self, number, layer, *(changed or (args, kwargs)))
            if self.give is None and not is_compiled():
                snapshot.watch.start(snapshot.kwargs)
        if changed is not None and checkpointing.runs_hooks_again(layer):
            checkpointing.save_arguments(number, layer, (args, kwargs), changed, self.cut_hidden)
        columns.record_layer(number)
        if self.give is not None:
            self.give()
            self.give = None
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
            self.columns.state.reading.append(None)

    def stop_reading(self) -> None:
        """Lets the cache's layers refuse keys and values again, which models that are not patched would add."""
        if self.columns.state is not None:
            self.columns.state.reading.pop()

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
            state.open = self.visual is not None and not self.options.generates
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
                shape=spec.shape,
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

    def _cut(self, number: int, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        visual, columns = self.visual, self.columns
        assert visual is not None
        incoming = (args, kwargs)  # hidden states may be cut already; all others have the length of the full prompt
        if columns.is_modified:
            args, kwargs = self.layer_arguments.of_layer(number, args, kwargs)
        snapshot = Snapshot.take(self, number, layer, args, kwargs)
        self.trains = snapshot.hidden.requires_grad
        flat = self.live.nonzero()[:, 0] if columns.is_cut else token_view.all_tokens(visual)
        selection = self._select(number, flat, snapshot)
        if selection.merged is None and len(selection.kept) == len(flat):
            self._made(number, selection)
            return (args, kwargs) if columns.is_modified else None
        slot, merge = columns.slot_of_position(), None
        if selection.merged is not None:
            tokens, states = selection.merged
            rows = visual.sample[tokens]
            merge = rows, slot[rows, visual.position[tokens]], states
        self.live = torch.zeros_like(self.live).index_fill_(0, selection.kept, True)
        stays = slot >= 0
        stays.masked_scatter_(visual.mask, self.live)
        relative = columns.keep(stays, incoming[1].get("position_embeddings"))
        self.layer_arguments = LayerArguments(columns, self.spec.attention_form)
        self._cut_records(relative)
        self._made(number, selection)
        slots = to_device(relative, snapshot.hidden.device)
        self.cut_hidden = functools.partial(_cut_hidden, slots, merge)
        if merge is None and not (torch.is_grad_enabled() or is_compiled()):  # the layer runs next
            pick = functools.partial(_cut_hidden, slots, None)
            self.give = functools.partial(snapshot.watch.projections.give, snapshot.hidden.shape[:2], pick)
        return self.layer_arguments.of_layer(number, *with_hidden_states(*incoming, self.cut_hidden(snapshot.hidden)))

    def _cut_records(self, relative: Tensor) -> None:
        """Cuts the records of column taps, and DeepStack features, in the same way as the prompt."""
        for name in self.spec.column_taps:
            records = self.recorded.get(name, [])
            self.recorded[name] = [gather.gather(r, to_device(relative, r.device), 1) for r in records]
        if self.deepstack is not None:
            self.deepstack.cut(self.columns.index, self.columns.valid)

    def _select(self, number: int, flat: Tensor, snapshot: Snapshot) -> Selection:
        """Lets the methods select from the live visual tokens `flat` `[M]` before layer `number`."""
        if self.memo is not None:
            return self.memo[len(self.stages)]
        selections = [self._select_by(call, number, flat, snapshot) for call in self.cuts[number]]
        return selections[0] if len(self.spec.uses) == 1 else _combine(flat, selections)

    def _select_by(self, call: MethodCall, number: int, live: Tensor, snapshot: Snapshot) -> Selection:
        """Lets one method select from its tokens among the live ones before layer `number`."""
        method, counts = call.use.method, call.counts[number]
        members = None if len(self.spec.uses) == 1 else call.members[live]
        flat = live if members is None else live[members]
        if call.groups.count(flat) == counts:
            return Selection(live)
        checks, name = DeferredChecks(), name_of(method)
        # A layer whose hooks run again, in checkpointing, gets its merged states as constants.
        differentiable = self.trains and method.differentiable and not checkpointing.runs_hooks_again(snapshot.layer)
        with torch.set_grad_enabled(differentiable):
            tokens, choice = self._ask(call, number, flat, snapshot, checks)
        given = [] if choice.scores is None else [choice.scores.detach().to(torch.float32, copy=True)]
        keep, *scores = checks.raise_if_failed(choice.keep, *given)
        kept = flat[keep] if keep.shape == flat.shape else None
        got = None if kept is None else call.groups.count(kept)
        if kept is None or got != counts:
            raise MethodError(
                f"{name} kept {keep.tolist() if got is None else got} tokens of its groups before layer {number}; the "
                f"budget is {counts}"
            )
        merged, chosen = None, keep
        if self.required is not None:
            groups = call.groups.of_token[flat]
            keep = self._with_required(keep, flat, groups, scores[0] if scores else None)
            kept = flat[keep]
        if choice.hidden is not None:
            # A group that loses no token is not merged, as for its sample alone, which would not be pruned.
            some = call.groups.shrinking(flat, kept)
            some &= chosen | ~keep  # tokens that stay only because they are required keep their states
            merged = flat[some], choice.hidden[to_device(some, choice.hidden.device)]
            if self.trains and not differentiable:
                warn_once(
                    f"{name} merges tokens, and merged states are constants "
                    f"{'under gradient checkpointing' if method.differentiable else 'in training'}: no gradient "
                    "reaches the vision tower through them; to train it, choose a method that merges nothing, such as "
                    "'iwp' or 'divprune'"
                )
        states = tokens.hidden.detach().float().cpu() if explain.wanted() else None
        if members is None:
            return Selection(kept, merged, scores[0] if scores else None, states)
        stays = ~members
        stays[members] = keep
        among = [_scatter_to_all(members, values) for values in (*scores[:1], states) if values is not None]
        return Selection(live[stays], merged, among[0] if scores else None, None if states is None else among[-1])

    def _ask(
        self, call: MethodCall, number: int, flat: Tensor, snapshot: Snapshot, checks: DeferredChecks
    ) -> tuple[Tokens, Choice]:
        """What a method sees before layer `number`, and its choice.

        Raises:
            MethodError: It returned something else than a choice, or changed tensors that are not its own.
        """
        lent, name = Lent(), name_of(call.use.method)
        try:
            tokens = token_view.tokens(self, call, number, flat, snapshot, checks, lent)
            self.selects = True
            choice = call.use.method.choose(tokens)
        except Exception:
            checks.raise_if_failed()  # NaN in its inputs is the likelier cause of the method's error
            raise
        finally:
            self.selects = False
        try:
            lent.check(name)
        except MethodError:
            assert self.visual is not None
            self.visual.derived.clear()  # so that later calls of the layout get what they should
            raise
        check_choice(choice, tokens, name)
        if choice.hidden is not None and number and snapshot.hidden.shape[2:] != tokens.hidden.shape[1:]:
            raise MethodError(
                f"{name} merges tokens before layer {number}, where {type(snapshot.layer).__name__} takes several "
                f"streams a token ({tuple(snapshot.hidden.shape[2:])}, hyper-connections), and it is unknown how to "
                "merge these; choose a method that merges nothing, such as 'iwp' or 'divprune', or one that merges "
                "before layer 0, where all streams are copies"
            )
        _check_finite(call.use.method, choice, checks)
        return tokens, choice

    def _with_required(self, keep: Tensor, flat: Tensor, groups: Tensor, scores: Tensor | None) -> Tensor:
        """`keep` `[M]` with the required tokens, each instead of the lowest selected token of its group."""
        assert self.required is not None
        required = self.required[flat]
        missing = required & ~keep
        if not bool(missing.any()):
            return keep
        keep = keep.clone()
        ranks = torch.arange(len(keep), 0, -1).float() if scores is None else torch.nan_to_num(scores)
        for group in groups[missing].unique().tolist():
            out = (keep & ~required & (groups == group)).nonzero()[:, 0]
            lowest = torch.sort(ranks[out], stable=True, descending=True).indices
            count = int((missing & (groups == group)).sum())
            keep[out[lowest[len(out) - count :]]] = False
        return keep | required

    def _made(self, number: int, selection: Selection) -> None:
        """Records the selection of a stage."""
        self.selections.append(selection)
        self.stages.append(number)


def _positions(visual: VisualTokens, past: int, tokens: Tensor) -> list[Tensor]:
    """Positions in the conversation of the given visual tokens `[m]`, for every sample."""
    found = torch.bincount(visual.sample[tokens], minlength=len(visual.counts))
    return list((visual.position[tokens] + past).split(found.tolist()))


def _check_finite(method: Method, choice: Choice, checks: DeferredChecks) -> None:
    """Adds the checks that no token was ranked by NaN, and that the states of kept tokens are finite.

    Methods that do not rank by their scores report NaN for tokens without one.
    """
    name, scores, hidden = name_of(method), choice.scores, choice.hidden

    def refuse_scores() -> None:
        assert scores is not None
        if bool(scores.isnan().any()):
            raise MethodError(f"{name} scored tokens NaN; expected numbers (infinite ones keep or drop a token)")

    def refuse_states() -> None:
        assert hidden is not None
        if not bool(torch.isfinite(hidden[choice.keep.to(hidden.device)]).all()):
            raise MethodError(f"{name} merged tokens to states with NaN or Inf; expected finite ones")

    if scores is not None and isinstance(method, ScoreMethod):
        checks.add(scores, refuse_scores)
    if hidden is not None:
        checks.add(hidden, refuse_states)


def _split_keep(
    budget: budgets.Budget, groups: list[BudgetGroups], least: list[list[int]] | None
) -> list[list[int] | None]:
    """Final counts of each method's groups for `keep`, which is split over all groups of a sample; None for a ratio."""
    if budget.keep is None:
        return [None] * len(groups)
    sizes = [size for members in groups for size in members.sizes]
    by_sample: dict[int, list[int]] = {}
    start = 0
    for members in groups:
        for row, numbers in members.by_sample.items():
            by_sample.setdefault(row, []).extend(number + start for number in numbers)
        start += len(members.sizes)
    floors = [number for numbers in least or () for number in numbers]
    counts = iter(budgets.split_over_groups(budget.keep, sizes, [*by_sample.values()], floors))
    return [[next(counts) for _ in members.sizes] for members in groups]


def _scatter_to_all(members: Tensor, values: Tensor) -> Tensor:
    """Scatters values `[m, ...]` of the tokens `members` `[M]` to all tokens; the others get NaN."""
    if bool(members.all()):
        return values
    out = values.new_full((len(members), *values.shape[1:]), torch.nan)
    out[members] = values
    return out


def _combine(flat: Tensor, selections: list[Selection]) -> Selection:
    """Combines the selections of methods that prune different tokens."""
    stays = torch.stack([torch.isin(flat, selection.kept) for selection in selections]).all(0)
    merged = [selection.merged for selection in selections if selection.merged is not None]
    kinds = ("scores", "states")
    values = {kind: [v for d in selections if (v := getattr(d, kind)) is not None] for kind in kinds}
    return Selection(
        flat[stays],
        (torch.cat([tokens for tokens, _ in merged]), torch.cat([states for _, states in merged])) if merged else None,
        **{kind: _first_known(found) if found else None for kind, found in values.items()},
    )


def _first_known(values: list[Tensor]) -> Tensor:
    """For every token, the value of the first tensor in which it is not NaN."""
    out = values[0]
    for other in values[1:]:
        out = torch.where(out.isnan(), other, out)
    return out


def begin(
    spec: PruneSpec,
    options: CallOptions,
    caches: kv_cache.Caches,
    inputs: dict[str, Any] | None,
    kwargs: dict,
    visual: VisualTokens | None,
) -> DecoderCall | None:
    """Creates the state of a call of the decoder, before it runs.

    Args:
        spec: Methods, budget and model of the patch.
        options: Settings of the call.
        caches: The caches that the patch knows.
        inputs: Keyword arguments of the composite's call around it, None if the decoder was called directly.
        kwargs: Arguments of the decoder, by name.
        visual: The visual tokens to prune, or None.

    Returns:
        DecoderCall: None if the call has nothing to prune and no pruned cache, so that nothing has to be changed.
    """
    cache = cache_of(kwargs)
    state = caches.state_of(cache)
    if visual is None and state is None:
        return None
    if state is not None:
        follows = state.open and state.length == kv_cache.length(cache)
        given_apart = options.own_budget or not options.may_drop
        if visual is not None and follows and not given_apart and spec.window is None:
            raise UnsupportedModelError(
                "this call adds visual tokens right after a prompt with visual tokens, as if one prompt were passed in "
                "several calls, each of which would be pruned by itself; pass the whole prompt in one call, or give "
                "this call a budget of its own inside patch.using(...)"
            )
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
    past = kv_cache.length(cache)
    real, real_past, padded, uncut = None, None, False, None
    if visual is not None:  # decoding steps do not need the mask, and reading it would synchronize with the device
        real, real_past = _real_columns(inputs or {}, kwargs, batch, length, past)
        padded = not bool(real.all())
        uncut = visual.cached("uncut", lambda: gather.all_positions(batch, length))
        visual = visual.visible(real) if padded else visual  # visual tokens that the mask hides are padding
    mixing = spec.anatomy.mixes_columns
    columns = Columns((batch, length), real, past, state, cache, spec.renumbers, mixing, padded, uncut)
    call = DecoderCall(
        spec, options, caches, columns, visual, inputs or {}, real_past, embeds=kwargs.get("inputs_embeds")
    )
    call.start_reading()
    return call


def _real_columns(
    inputs: dict[str, Any], kwargs: dict[str, Any], batch: int, length: int, past: int
) -> tuple[Tensor, Tensor | None]:
    """Positions that are not padding, on the CPU: `[B, T]` of this call, and `[B, past]` before it, if known."""
    given = [kwargs.get("attention_mask"), inputs.get("attention_mask")]
    for m in sorted(given, key=lambda m: not (isinstance(m, Tensor) and m.dim() == 2)):
        if not (isinstance(m, Tensor) and m.dim() == 2):
            seen = attended(m, batch, length)
            m = None if seen is None else seen.any(1)  # a position is padding if no query attends to it
        if m is not None and m.shape[1] >= past + length:
            known = m.to("cpu", torch.bool, copy=True).expand(batch, -1)
            if m.shape[1] == length:
                return known, None
            return known[:, past : past + length].clone(), known[:, :past]
    return torch.ones(batch, length, dtype=torch.bool), None


def _cut_hidden(index: Tensor, merge: tuple[Tensor, Tensor, Tensor] | None, hidden: Tensor) -> Tensor:
    """Gathers the slots `index` `[B, K']` of hidden states `[B, K, D]`, after writing merged states into them.

    Streams of hyper-connections, `[B, K, S, D]` or `[B, K, S * D]`, are copies where states are merged.
    """
    if merge is not None:
        rows, slots, merged = merge
        if merged.shape[1:] != hidden.shape[2:]:
            streams = hidden.shape[2:].numel() // merged.shape[1]
            merged = merged.repeat(1, streams).view(len(merged), *hidden.shape[2:])
        hidden = hidden.index_put((rows.to(hidden.device), slots.to(hidden.device)), merged.to(hidden.dtype))
    return gather.gather(hidden, index, 1)
