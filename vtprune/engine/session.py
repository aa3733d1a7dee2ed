# SPDX-License-Identifier: Apache-2.0
"""The hooks of a patched model: what they are attached to, what they do, and what they remember between each other.

What belongs to a call lives in the calling thread and is gone when the call returns; what belongs to a generation lives
with its cache.
"""

from __future__ import annotations

import functools
import inspect
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..core.budget import Budget
from ..core.method import Tap
from ..errors import NothingPrunedError, UnsupportedModelError
from ..models import attention_probe, encoder_outputs, unsupported, visual_tokens
from ..models.encoder_outputs import Encoded
from ..models.transformers_names import (
    ENCODER_OUTPUTS,
    MAKE_CANDIDATES,
    RUN_PROMPT,
    cache_of,
    encoder_method,
)
from ..models.visual_tokens import VisualTokens
from ..report.pruning import Pruning
from ..towers.cut import TowerCut
from ..vision.tower import warn_once
from . import checkpointing, generation, merged, outputs, prefill, requests, window
from .call import CallOptions
from .deepstack import intercept_deepstack
from .hooks import Hook, Override, is_compiled
from .kv_cache import Caches
from .spec import PruneSpec


class ThreadState(threading.local):
    """What one thread is doing with a patched model."""

    def __init__(self) -> None:
        self.outer: dict[str, Any] | None = None  # keyword arguments of the outermost model's running call
        self.finished: Pruning | None = None  # the last prefill of that call
        self.balanced: torch.Tensor | None = None  # mask over which that call balances experts
        self.inputs: dict[str, Any] | None = None  # keyword arguments of the composite's running call
        self.encoded: dict[str, Encoded] = {}  # the last encoding of each kind of features
        self.fresh: set[str] = set()  # kinds encoded inside the composite's running call
        self.encoding: dict[str, list] | None = None  # taps of the running encoder
        self.tower_ran = False  # the vision tower, inside the composite's running call
        self.found_visual: bool | None = (
            None  # whether visual tokens were found in it; None before its decoder is called
        )
        self.call: prefill.DecoderCall | None = None  # the decoder's running call
        self.records: dict[str, list] = {}  # taps of the running call
        self.last: Pruning | None = None
        self.cacheless: tuple | None = None  # the last prefill without a cache, see `_continued`


class Session:
    """A patch at work: per-thread state and the bodies of the hooks.

    Attributes:
        model: As it was patched, wrappers included.
        spec: What was asked for, and of which model.
        features: Lately returned by encoders outside a call of the model.
        caches: That the model was shown.
        thread: State of the calling thread.
    """

    def __init__(self, model: nn.Module, spec: PruneSpec) -> None:
        self.model = model
        self.spec = spec
        self.thread = ThreadState()
        self.features = merged.Features()  # that encoders returned outside a call of the model
        self.caches = Caches()
        self.tower = self._tower_cut()
        self._last: Pruning | None = None
        self._layouts = visual_tokens.LayoutMemo()
        self._signature: tuple[Any, inspect.Signature] | None = None  # of the composite's forward

    @property
    def budget(self) -> Budget:
        """The budget of the running request."""
        return requests.current(self).budget or self.spec.budget

    @property
    def drops(self) -> bool:
        """Whether a prompt with visual tokens of the running request may lose some."""
        return not requests.current(self).paused and self.budget.may_drop

    @property
    def last(self) -> Pruning | None:
        """The most recent prefill: of the calling thread if it ran one, else of any. None before the first."""
        return self.thread.last or self._last

    def _tower_cut(self) -> TowerCut | None:
        """What cuts the vision tower, or counts its work; None where it has no blocks and none was asked to be cut."""
        try:
            return TowerCut(self.spec.anatomy, self.spec.tower, lambda: not requests.current(self).paused)
        except UnsupportedModelError:
            if self.spec.tower is not None:
                raise
            return None

    def attach(self, owner: Any) -> list[Any]:
        """Puts the hooks on the model.

        Args:
            owner: What `hooks.owner_of` finds on the model from now on.

        Returns:
            list: Handles with `remove`, in the order of attaching.
        """
        parts = self.spec.anatomy
        handles: list[Any] = []
        add = handles.append
        for kind in parts.placeholders:
            name = encoder_method(kind)
            if hasattr(parts.composite, name):
                add(Override(parts.composite, name, self._encoder(kind, getattr(parts.composite, name))))

        if hasattr(parts.model, MAKE_CANDIDATES):
            make = generation.delay_first_candidates(getattr(parts.model, MAKE_CANDIDATES), self._prunes)
            add(Override(parts.model, MAKE_CANDIDATES, make))

        if hasattr(parts.model, RUN_PROMPT):
            run = generation.refuse_chunks(getattr(parts.model, RUN_PROMPT), self._prunes, self.caches.state_of)
            add(Override(parts.model, RUN_PROMPT, run))

        def before(module: nn.Module, function: Callable) -> None:
            add(module.register_forward_pre_hook(Hook(owner, function), with_kwargs=True))

        def after(module: nn.Module, function: Callable, always: bool = False) -> None:
            add(module.register_forward_hook(Hook(owner, function), with_kwargs=True, always_call=always))

        if parts.model is not parts.composite:
            before(parts.model, self._before_model)
            after(parts.model, self._after_model, always=True)
        before(parts.composite, self._before_composite)
        before(parts.decoder, self._before_decoder)
        after(parts.vision_tower, self._after_tower)
        if parts.projector is not None:
            after(parts.projector, self._after_projector)
        # Early-fusion models are both at once: the decoder's call ends first.
        after(parts.decoder, self._after_decoder)
        after(parts.composite, self._after_composite, always=True)
        for number, layer in enumerate(parts.layers):
            before(layer, self._layer_hook(number))
        taps = list(self.spec.taps)
        if self.tower is not None:
            handles += self.tower.attach(lambda function: Hook(owner, function))
            taps.append(self.tower.tap())
        for tap in taps:
            after(tap.module, self._tap_hook(tap))
        return handles

    def _encoder(self, kind: str, encode: Callable) -> Callable:
        def watch(*args: Any, **kwargs: Any) -> Any:
            thread = self.thread
            if thread.encoding is not None:  # some encoders of clips call that of pictures, on what are clips
                return encode(*args, **kwargs)
            records: dict[str, list] = {}
            thread.encoding = records
            try:
                output, thread.encoded[kind] = encoder_outputs.watch(kind, encode, args, kwargs, records)
            finally:
                thread.encoding = None
            if thread.inputs is None:
                self.features.note(output, thread.encoded[kind])
            thread.fresh.add(kind)
            return output

        uncompiled = torch.compiler.disable(watch, reason="pruning notes what encoders are given")

        @functools.wraps(encode)
        def watched(*args: Any, **kwargs: Any) -> Any:
            return (uncompiled if is_compiled() else watch)(*args, **kwargs)

        return watched

    def _prunes(self, ids: torch.Tensor) -> bool:
        """Whether a prompt `[B, T]` has visual tokens that will be pruned."""
        if not self.drops:
            return False
        tokens = torch.tensor(list(self.spec.anatomy.placeholders.values()), device=ids.device)
        return bool((torch.isin(ids, tokens).sum(1) > (self.budget.keep or 0)).any())

    def _after_tower(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        self.thread.tower_ran = True
        if self.spec.anatomy.projector is None:
            self._after_projector(module, args, kwargs, output)

    def _after_projector(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if self.thread.inputs is None and self.thread.encoding is None:  # called by hand
            self.features.note(output, Encoded(next(iter(self.spec.anatomy.placeholders)), {}, None))

    def _before_model(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        thread = self.thread
        thread.outer, thread.finished, thread.records = kwargs, None, {}
        if not self.drops or not _asks_for("output_router_logits", kwargs, module):
            return None
        # The loss that balances experts is taken over the columns of this mask; those that are dropped leave it.
        ids = kwargs.get("input_ids", args[0] if args else None)
        mask = kwargs.get("attention_mask")
        if isinstance(mask, torch.Tensor) and mask.dim() == 2:
            thread.balanced = mask.clone()
        elif mask is None and isinstance(ids, torch.Tensor):
            thread.balanced = torch.ones_like(ids)
        else:
            return None
        return args, {**kwargs, "attention_mask": thread.balanced}

    def _after_model(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        thread = self.thread
        finished, thread.outer, thread.finished, thread.balanced = thread.finished, None, None, None
        return None if finished is None or output is None else outputs.without_dropped(output, finished.mask)

    def _before_composite(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        thread = self.thread
        thread.call, thread.fresh = None, set()
        thread.records = thread.records if thread.outer is not None else {}
        thread.tower_ran, thread.found_visual = False, None
        self.caches.state_of(cache_of(kwargs))  # before the model asks for its length
        bound = self._signature_of(module.forward).bind_partial(*args, **kwargs).arguments
        extra = bound.pop("kwargs", {})
        if self.drops:
            unsupported.refuse_ignored_features(module, extra)
        thread.inputs = {**bound, **extra}

    def _signature_of(self, forward: Callable) -> inspect.Signature:
        """Signature of the composite's forward, read anew only where another function took its place."""
        known = self._signature
        if known is None or known[0] != forward:
            self._signature = known = forward, inspect.signature(forward)
        return known[1]

    def _after_composite(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        thread = self.thread
        thread.inputs, thread.call, thread.records = None, None, {}
        late = (
            thread.tower_ran and thread.found_visual is False and output is not None
        )  # the tower ran inside the decoder
        if late and self.drops:
            raise NothingPrunedError(
                f"the vision tower ran while the decoder did, but no argument of {type(module).__name__} was "
                "recognized as pixels or features, so nothing was pruned; pass them as pixel_values"
            )

    def _before_decoder(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        thread = self.thread
        visual, encoded = None, {}
        if thread.inputs is not None and not requests.current(self).paused:
            encoded = encoder_outputs.supplied(
                thread.inputs, thread.encoded, thread.fresh, list(self.spec.anatomy.placeholders)
            )
            if not encoded and thread.tower_ran:  # pictures came by a name that nobody knows
                encoded = {kind: Encoded(kind, {}, None) for kind in self.spec.anatomy.placeholders}
            if encoded:
                unsupported.refuse_tracing(thread.inputs)
                visual = self._layouts.locate(thread.inputs, self.spec.anatomy, encoded)
            if encoded and visual is None and self.drops:
                raise NothingPrunedError(
                    f"{' and '.join(encoded)} features came with a prompt that has none of the placeholder tokens "
                    f"{self.spec.anatomy.placeholders}; expected the processor's input_ids, with one placeholder per "
                    "visual token"
                )
        if not encoded and self.drops:
            visual, encoded = self._merged(kwargs)
        thread.found_visual = visual is not None
        outer = {**(thread.inputs or {}), **(thread.outer or {})} if visual is not None else {}
        request = requests.current(self)
        own_budget = request.budget is not None or not self.drops
        options = CallOptions(self.budget, request.question_end, outer, own_budget)
        thread.call = call = prefill.begin(self.spec, options, self.caches, thread.inputs, args, kwargs, visual)
        if call is None:
            return None
        visual = call.visual
        if visual is not None:
            if call.cuts:
                given = {**kwargs, **outer} if thread.inputs is None else outer
                unsupported.refuse_packed_rows(given, call.columns.real, call.columns.past)
            if not call.cuts and options.budget.keep is None and self.drops:
                visual_tokens.refuse_single_placeholders(visual, encoded, str(options.budget))
            for source in encoded.values():
                self.features.forget(source)
                # `generate` hands the pictures to the encoder and names them again, as None, to the model.
                call.inputs = {**source.inputs, **{k: v for k, v in call.inputs.items() if v is not None}}
                for name, records in source.records.items():
                    thread.records.setdefault(name, []).extend(records)
            self._continued(call, kwargs)
        call.recorded = thread.records
        call.differentiable = torch.is_grad_enabled() and _asks_for("output_hidden_states", kwargs, module)
        if call.differentiable and call.cuts and _asks_for("output_attentions", kwargs, module):
            warn_once(
                "attention maps of pruned layers are put back into the prompt's length as copies: gradients can be "
                "taken of hidden states, but retain_grad() on such a map stays None"
            )
        if not call.cuts:
            return None
        later = any(map(checkpointing.runs_hooks_again, self.spec.anatomy.layers))
        found = intercept_deepstack(kwargs, (call.columns.batch, call.columns.length), later)
        if found is None:
            return None
        call.deepstack, kwargs = found
        return args, kwargs

    def _merged(self, kwargs: dict) -> tuple[VisualTokens | None, dict[str, Encoded]]:
        """Visual tokens of a call that brings no features as such: those that the caller put into its embeddings.

        Raises:
            NothingPrunedError: There are some, and nobody can tell where.
        """
        thread, said = self.thread, requests.current(self).visual
        inputs = kwargs if thread.inputs is None else thread.inputs
        kinds: torch.Tensor | None = None
        sources: list[Encoded] = []
        embeds, states = inputs.get("inputs_embeds"), kwargs.get("inputs_embeds")
        placeholders = self.spec.anatomy.placeholders
        if said is not None and isinstance(states, torch.Tensor):
            kinds = merged.said_columns(said, (states.shape[0], states.shape[1]), placeholders)
        elif isinstance(embeds, torch.Tensor) and embeds.dim() == 3 and embeds.shape[1] > 1:
            unsupported.refuse_tracing(inputs)
            with attention_probe.hooks_disabled():
                foreign = self.features.foreign(embeds, self.spec.anatomy.embeddings)
            foreign[:, : _virtual_tokens(self.model)] = False
            if not bool(foreign.any()):
                return None, {}
            kinds = self._kinds_told(inputs, foreign.shape)
            if kinds is None:
                found, sources = self.features.found(embeds)
                names = list(placeholders)
                kinds = found.to(torch.uint8) * (1 + names.index(sources[0].kind) if sources else 1)
            left = int((foreign & (kinds == 0)).sum())
            if left:
                merged.refuse_foreign(left)
        if kinds is None or not bool(kinds.any()):
            return None, {}
        encoded = {name: Encoded(name, {}, None) for i, name in enumerate(placeholders) if bool((kinds == i + 1).any())}
        if len(sources) == 1 and sources[0].total == int((kinds > 0).sum()):
            encoded = {sources[0].kind: sources[0]}
        return visual_tokens.locate({**(thread.outer or {}), **inputs}, self.spec.anatomy, encoded, kinds), encoded

    def _kinds_told(self, inputs: dict, shape: torch.Size) -> torch.Tensor | None:
        """Kinds of the columns, `[B, T]`, by token types or by ids that only the outermost model was given."""
        outer = self.thread.outer or {}
        types, ids = inputs.get("mm_token_type_ids", outer.get("mm_token_type_ids")), outer.get("input_ids")
        if isinstance(types, torch.Tensor) and types.shape == shape:
            order = {"image": 1, "video": 2}  # transformers' numbers
            kinds = torch.zeros(shape, dtype=torch.uint8)
            for number, name in enumerate(self.spec.anatomy.placeholders):
                kinds[types.cpu() == order.get(name, 0)] = number + 1 if name in order else 0
            return kinds
        if isinstance(ids, torch.Tensor) and ids.shape == shape:
            return merged.said_columns(ids, (shape[0], shape[1]), self.spec.anatomy.placeholders)
        return None

    def _after_decoder(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        call, self.thread.call = self.thread.call, None
        if call is None:
            return None
        output = call.finish(output)
        if call.visual is not None:
            record, thread = call.record(), self.thread
            if self.spec.window is not None:
                record.evicted = window.evict(call, self.spec.window)
            thread.last = self._last = thread.finished = Pruning(**vars(record))
            if thread.balanced is not None and thread.balanced.shape[1] >= call.columns.past + call.columns.length:
                kept = thread.last.mask.to(thread.balanced.device)
                thread.balanced[:, call.columns.past :][:, : kept.shape[1]].mul_(kept)
        return output

    def _layer_hook(self, number: int) -> Callable:
        def before_layer(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            call = self.thread.call
            if call is None:
                return checkpointing.replay(number, module, args, kwargs)
            return call.before_layer(number, module, args, kwargs)

        return before_layer

    def _tap_hook(self, tap: Tap) -> Callable:
        def record(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            thread = self.thread
            store = thread.records if thread.encoding is None else thread.encoding
            outside = thread.inputs is None and thread.encoding is None and thread.outer is None
            if requests.current(self).paused or outside:
                return
            if tap.columns and (thread.call is None or not thread.call.cuts):
                return
            if self.tower is not None:
                args, kwargs = self.tower.uncut(module, args, kwargs)
            with torch.no_grad():
                value = tap.record(args, kwargs, output)
            if value is not None:
                store.setdefault(tap.name, []).append(value)

        return record

    def _continued(self, call: prefill.DecoderCall, kwargs: dict) -> None:
        """Without a cache every step of a generation is a prefill of its own; it must keep the first one's tokens.

        A prompt that is the previous one and one more column, on the very same feature tensors, continues it.
        """
        thread = self.thread
        previous, thread.cacheless = thread.cacheless, None
        ids = call.inputs.get("input_ids")
        if call.columns.cache is not None or ids is None or kwargs.get("use_cache") is not False or not call.cuts:
            return
        inputs = thread.inputs or {}
        given = [inputs[n] for n in sorted(inputs) if n.startswith("pixel")]
        given += list((inputs.get(ENCODER_OUTPUTS) or {}).values())
        sources = [weakref.ref(source) for source in given if source is not None]
        if previous is not None:
            old_ids, old_sources, decisions = previous
            same = len(sources) == len(old_sources) and all(
                a() is b() for a, b in zip(sources, old_sources, strict=True)
            )
            if same and sources and ids.shape[1] == old_ids.shape[1] + 1 and torch.equal(ids[:, :-1], old_ids):
                call.memo = decisions
        # `decisions` is filled while the call runs.
        thread.cacheless = (ids, sources, call.decisions)


def _virtual_tokens(model: nn.Module) -> int:
    """Columns that an adapter puts in front of every prompt (PEFT's prompt tuning)."""
    config: Any = getattr(model, "active_peft_config", None)
    return int(getattr(config, "num_virtual_tokens", 0) or 0) if getattr(config, "is_prompt_learning", False) else 0


def _asks_for(name: str, kwargs: dict[str, Any], module: nn.Module) -> bool:
    """Whether a call, or else the model's config, asks for an output."""
    given = kwargs.get(name)
    if given is not None:
        return given is not False
    config: Any = getattr(module, "config", None)
    return any(getattr(c, name, False) for c in (config, getattr(config, "text_config", None)) if c is not None)
