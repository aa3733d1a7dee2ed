# SPDX-License-Identifier: Apache-2.0
"""One decoder call, stage by stage: observe, decide, compact.

The decoder itself is called with the full prompt and goes on making masks and rotations for all of it. What changes is
what its layers receive: from the first cut on every layer gets the surviving columns only, with the rotation, positions
and masks of just these columns (`columns`). When the decoder returns, its last hidden state is put back into the
caller's length. The same object serves later calls on a pruned cache, where nothing is cut and masks have to be
translated.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import budget as budgets
from . import compact, decode, explain, reading, recompute
from .columns import AttentionForm, Columns
from .deepstack import Planes
from .errors import MethodError, NothingPrunedError, UnsupportedModelError
from .pictures_source import Source
from .report import Pruning
from .sending import Doubts, send
from .visual_tokens import VisualTokens

if TYPE_CHECKING:
    from .patching import Patch


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
        """Makes a pool of every sample, or of every image of a sample."""
        new = torch.ones(len(visual), dtype=torch.bool)
        new[1:] = visual.sample.diff() != 0
        if by == "image":
            new[1:] |= visual.image.diff() != 0
        of_token = new.cumsum(0) - 1
        groups: dict[int, list[int]] = {}
        for pool, sample in enumerate(visual.sample[new].tolist()):
            groups.setdefault(sample, []).append(pool)
        return cls(of_token, torch.bincount(of_token).tolist(), list(groups.values()))

    def losing(self, flat: Tensor, kept: Tensor) -> Tensor:
        """`[M]` bool: which of the tokens `flat` are in pools of which fewer are `kept`."""
        before, after = (torch.bincount(self.of_token[x], minlength=len(self.sizes)) for x in (flat, kept))
        return (after < before)[self.of_token[flat]]


@dataclass
class Decision:
    """What was decided at one stage.

    Attributes:
        kept: `[M']` numbers of the surviving tokens among all visual tokens of the call.
        merged: New states of the tokens that were alive, for methods that merge; or None.
        scores: The method's scores of the tokens that were alive; or None.
        states: Their states, where a call is recorded (`explain`); or None.
    """

    kept: Tensor
    merged: Tensor | None = None
    scores: Tensor | None = None
    states: Tensor | None = None


@dataclass
class DecoderCall:
    """State of one call of the decoder.

    Attributes:
        patch: Whose method and budget apply.
        columns: The columns that are left, and what layers are given.
        visual: The visual columns, or None where nothing is to be cut.
        inputs: Keyword arguments of the composite's call and of its encoders.
        real_past: `[B, past]` bool or None: columns in the cache that are not padding.
        memo: Decisions of an earlier call without a cache that this one continues.
        planes: DeepStack features, where the decoder has them.
        observed: Records of the method's taps.
        memory: The method's own, from stage to stage.
        seconds: Host time spent at the cuts.
        copies: Of each sample and its pixels, made before the pictures were encoded.
    """

    patch: Patch
    columns: Columns
    visual: VisualTokens | None
    inputs: dict[str, Any]
    real_past: Tensor | None = None
    memo: list[Decision] | None = None
    planes: Planes | None = None
    observed: dict[str, list] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    copies: int = 1

    def __post_init__(self) -> None:
        self.snapshots: dict[int, reading.Snapshot] = {}
        self.decisions: list[Decision] = []
        self.stages: list[tuple[int, list[Tensor]]] = []
        self.counts: dict[int, list[int]] = {}  # layer of a cut -> tokens left in each pool
        self.reads: set[int] = set()
        self.narrow: Callable[[Tensor], Tensor] | None = None  # of the cut before the present layer
        if self.visual is not None:
            self._plan(self.visual)

    def _plan(self, visual: VisualTokens) -> None:
        patch, layers = self.patch, self.patch.anatomy.num_layers
        self.alive = torch.ones(len(visual), dtype=torch.bool)
        self.pools = Pools.of(visual, patch.method.pool)
        plan = budgets.plan(patch.budget, patch.schedule, layers, self.pools.sizes, self.pools.groups)
        if plan[-1] != self.pools.sizes:
            self.counts = {stage.layer: count for stage, count in zip(patch.schedule, plan, strict=True)}
            self.reads = set(patch.method.reads(layers))
        elif patch.budget.asks_to_drop:
            raise NothingPrunedError(
                f"{patch.budget} of {sum(self.pools.sizes)} visual tokens (pools of {self.pools.sizes}) rounds to "
                "all of "
                "them, so nothing would be dropped; use a smaller ratio, or keep=, which may exceed what is there"
            )

    # --- what the hooks call ------------------------------------------------------------------------------------------

    def before_layer(self, number: int, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Cuts if a stage stands here, and gives the layer the arguments of the surviving columns."""
        columns = self.columns
        columns.cache = next((v for v in kwargs.values() if hasattr(v, "get_mask_sizes")), columns.cache)
        changed, self.narrow = None, None
        if number in self.counts:
            started = time.perf_counter()
            changed = self._cut(number, layer, args, kwargs)
            self.seconds += time.perf_counter() - started
        elif columns.touched:
            changed = columns.arguments(number, args, kwargs)
        if number in self.reads:
            self.snapshots[number] = reading.Snapshot.take(self, number, layer, *(changed or (args, kwargs)))
        if changed is not None and recompute.runs_hooks_again(layer):
            recompute.remember(number, layer, (args, kwargs), changed, self.narrow)
        columns.passed(number)
        return changed

    def finish(self, output: Any) -> Any:
        """Puts hidden states back into the caller's length and leaves the slots with the cache."""
        if len(self.stages) < len(self.counts):
            missed = sorted(set(self.counts) - {layer for layer, _ in self.stages})
            raise NothingPrunedError(
                f"the method cuts before layer {', '.join(map(str, missed))}, but the decoder finished without calling "
                f"{'it' if len(missed) == 1 else 'them'} as modules, so nothing was cut there; choose other layers, or "
                "report the model"
            )
        if not self.columns.is_cut:
            return output
        if self.columns.cache is not None:
            decode.attach(self.columns.cache, self.columns.state_after())
        return self.columns.restore(output)

    def pruning(self) -> Pruning:
        """The account of this call."""
        visual, columns = self.visual, self.columns
        assert visual is not None
        where = list((visual.column + columns.past).split(visual.counts))
        return Pruning(
            visual=where,
            kept=self.stages[-1][1] if self.stages else where,
            stages=self.stages,
            seconds=self.seconds,
            method=self.patch.method.name or type(self.patch.method).__name__,
            budget=str(self.patch.budget),
            columns=columns.past + columns.length,
            slots=[int(alive.shape[1]) for _, alive in columns.packings],
            held_before=columns.past,
            shape=self.patch.shape,
            places=visual,
            scores=[decision.scores for decision in self.decisions],
            kept_flat=[decision.kept for decision in self.decisions],
            source=Source.of(self.inputs, self.patch.anatomy, self.copies),
            states=[decision.states for decision in self.decisions],
        )

    # --- the cut ------------------------------------------------------------------------------------------------------

    def _cut(self, number: int, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        visual, columns = self.visual, self.columns
        assert visual is not None
        incoming = (args, kwargs)  # all but the hidden states still have the caller's length
        if columns.touched:
            args, kwargs = columns.arguments(number, args, kwargs)
        here = reading.Snapshot.take(self, number, layer, args, kwargs)
        flat = self.alive.nonzero()[:, 0]
        decision = self._decide(number, flat, here)
        if decision.merged is None and len(decision.kept) == len(flat):
            self._record(number, decision)
            return (args, kwargs) if columns.touched else None
        slot, put = columns.slot_of_column(), None
        if decision.merged is not None:
            # In a pool that loses nothing nothing is merged: alone, its sample would not have been asked.
            some = self.pools.losing(flat, decision.kept)
            part = flat[some]
            rows = visual.sample[part]
            put = rows, slot[rows, visual.column[part]], decision.merged[send(some, decision.merged.device)]
        self.alive = torch.zeros_like(self.alive)
        self.alive[decision.kept] = True
        stays = slot >= 0
        stays[visual.sample, visual.column] &= self.alive
        relative = columns.repack(stays, incoming[1].get("position_embeddings"))
        self._follow(relative)
        self._record(number, decision)
        self.narrow = functools.partial(_narrow, send(relative, here.hidden.device), put)
        return columns.arguments(number, *_with_hidden(*incoming, self.narrow(here.hidden)))

    def _follow(self, relative: Tensor) -> None:
        """Cuts what runs along with the columns: records of column taps and DeepStack features."""
        for name in self.patch.column_taps:
            records = self.observed.get(name, [])
            self.observed[name] = [compact.gather(r, send(relative, r.device), 1) for r in records]
        if self.planes is not None:
            self.planes.cut(self.columns.index, self.columns.alive)

    @torch.no_grad()
    def _decide(self, number: int, flat: Tensor, here: reading.Snapshot) -> Decision:
        """Asks the method which of the live visual tokens `flat` stay before layer `number`."""
        if self.memo is not None:
            return self.memo[len(self.stages)]
        pools, wanted = self.pools.of_token[flat], torch.tensor(self.counts[number])
        if torch.equal(torch.bincount(pools, minlength=len(wanted)), wanted):
            return Decision(flat)
        doubts = Doubts()
        tokens = reading.tokens(self, number, flat, wanted, here, doubts)
        try:
            choice = self.patch.method.choose(tokens)
        except Exception:
            doubts.settle()  # where numbers are broken, that is what is wrong
            raise
        keep, *scores = doubts.settle(choice.keep, *([] if choice.scores is None else [choice.scores.float()]))
        got = torch.bincount(pools[keep], minlength=len(wanted)) if keep.shape == flat.shape else None
        if got is None or not torch.equal(got, wanted):
            raise MethodError(
                f"{type(self.patch.method).__name__} kept {keep.tolist() if got is None else got.tolist()} tokens of "
                "its pools "
                f"before layer {number}; the budget is {wanted.tolist()}"
            )
        states = tokens.hidden.detach().float().cpu() if explain.wanted() else None
        return Decision(flat[keep], choice.hidden, scores[0] if scores else None, states)

    def _record(self, number: int, decision: Decision) -> None:
        visual = self.visual
        assert visual is not None
        self.decisions.append(decision)
        columns, alive = (visual.column + self.columns.past).split(visual.counts), self.alive.split(visual.counts)
        self.stages.append((number, [c[a] for c, a in zip(columns, alive, strict=True)]))


def begin(
    patch: Patch, inputs: dict[str, Any] | None, args: tuple, kwargs: dict, visual: VisualTokens | None
) -> DecoderCall | None:
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
            f"the decoder was given {batch} x {length} columns, but the prompt has {tuple(visual.mask.shape)}: this "
            "model "
            "changes the length of its prompt, and vtprune cannot tell which columns are visual"
        )
    past = decode.length(cache)
    real, real_past = torch.ones(batch, length, dtype=torch.bool), None
    if visual is not None:  # decoding steps need no look at the mask, which would wait for the device
        real, real_past = _real_columns(inputs or {}, kwargs, batch, length, past)
    form = AttentionForm(patch.attention, patch.dtype, patch.device)
    columns = Columns(real, past, state, cache, form, renumber=patch.renumbers)
    return DecoderCall(patch, columns, visual, inputs or {}, real_past)


def _real_columns(
    inputs: dict[str, Any], kwargs: dict[str, Any], batch: int, length: int, past: int
) -> tuple[Tensor, Tensor | None]:
    """Which columns are not padding: `[B, T]` of this call and, where known, `[B, past]` before it. On the CPU."""
    given = [kwargs.get("attention_mask"), inputs.get("attention_mask")]
    flat = [m for m in given if isinstance(m, Tensor) and m.dim() == 2]
    # Where only a prepared 4-D mask came, a column is padding if no query may see it.
    square = [m.get("full_attention", next(iter(m.values()), None)) if isinstance(m, dict) else m for m in given]
    for m in square:
        if isinstance(m, Tensor) and m.dim() == 4:
            flat.append((m if m.dtype == torch.bool else m > torch.finfo(m.dtype).min / 2)[:, 0].any(1))
    for m in flat:
        if m.shape[1] >= past + length:
            known = m[:, : past + length].bool().cpu().expand(batch, -1)
            return known[:, past:].clone(), known[:, :past]
    return torch.ones(batch, length, dtype=torch.bool), None


def _narrow(index: Tensor, put: tuple[Tensor, Tensor, Tensor] | None, hidden: Tensor) -> Tensor:
    """From hidden states `[B, K, D]` to those of the slots `index` `[B, K']`, merged ones put in before."""
    if put is not None:
        rows, slots, merged = put
        hidden = hidden.index_put((rows.to(hidden.device), slots.to(hidden.device)), merged.to(hidden.dtype))
    return compact.gather(hidden, index, 1)


def _with_hidden(args: tuple, kwargs: dict, hidden: Tensor) -> tuple[tuple, dict]:
    if "hidden_states" in kwargs:
        return args, {**kwargs, "hidden_states": hidden}
    return (hidden, *args[1:]), kwargs
