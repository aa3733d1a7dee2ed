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

from ..core.method import Tap
from ..errors import NothingPrunedError
from ..models import encoder_outputs, unsupported, visual_tokens
from ..models.encoder_outputs import Encoded
from ..models.transformers_names import ENCODER_OUTPUTS, EXPAND_PROMPT, MAKE_CANDIDATES, encoder_method
from ..report.pruning import Pruning
from . import checkpointing, generation, prefill, window
from .deepstack import intercept_deepstack
from .hooks import Hook, Override, is_compiled
from .spec import PruneSpec


class ThreadState(threading.local):
    """What one thread is doing with a patched model."""

    def __init__(self) -> None:
        self.inputs: dict[str, Any] | None = None  # keyword arguments of the composite's running call
        self.encoded: dict[str, Encoded] = {}  # the last encoding of each kind of features
        self.fresh: set[str] = set()  # kinds encoded inside the composite's running call
        self.encoding: dict[str, list] | None = None  # taps of the running encoder
        self.copies = 1  # of each sample that `generate` has made, for the call that follows
        self.tower_ran = False  # the vision tower, inside the composite's running call
        self.found_visual: bool | None = (
            None  # whether visual tokens were found in it; None before its decoder is called
        )
        self.call: prefill.DecoderCall | None = None  # the decoder's running call
        self.records: dict[str, list] = {}  # taps of the running call
        self.paused = 0
        self.last: Pruning | None = None
        self.cacheless: tuple | None = None  # the last prefill without a cache, see `_continued`


class Session:
    """A patch at work: per-thread state and the bodies of the hooks.

    Attributes:
        spec: What was asked for, and of which model.
        thread: State of the calling thread.
    """

    def __init__(self, spec: PruneSpec) -> None:
        self.spec = spec
        self.thread = ThreadState()
        self._last: Pruning | None = None

    @property
    def last(self) -> Pruning | None:
        """The most recent prefill: of the calling thread if it ran one, else of any. None before the first."""
        return self.thread.last or self._last

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
        if hasattr(parts.model, EXPAND_PROMPT):
            expand = generation.record_expansion(getattr(parts.model, EXPAND_PROMPT), self._note_copies)
            add(Override(parts.model, EXPAND_PROMPT, expand))

        def before(module: nn.Module, function: Callable) -> None:
            add(module.register_forward_pre_hook(Hook(owner, function), with_kwargs=True))

        def after(module: nn.Module, function: Callable, always: bool = False) -> None:
            add(module.register_forward_hook(Hook(owner, function), with_kwargs=True, always_call=always))

        before(parts.composite, self._before_composite)
        before(parts.decoder, self._before_decoder)
        after(parts.vision_tower, self._after_tower)
        # Early-fusion models are both at once: the decoder's call ends first.
        after(parts.decoder, self._after_decoder)
        after(parts.composite, self._after_composite, always=True)
        for number, layer in enumerate(parts.layers):
            before(layer, self._layer_hook(number))
        for tap in self.spec.taps:
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
            thread.fresh.add(kind)
            return output

        uncompiled = torch.compiler.disable(watch, reason="pruning notes what encoders are given")

        @functools.wraps(encode)
        def watched(*args: Any, **kwargs: Any) -> Any:
            return (uncompiled if is_compiled() else watch)(*args, **kwargs)

        return watched

    def _prunes(self, ids: torch.Tensor) -> bool:
        """Whether a prompt `[B, T]` has visual tokens that will be pruned."""
        tokens = torch.tensor(list(self.spec.anatomy.placeholders.values()), device=ids.device)
        return not self.thread.paused and bool(torch.isin(ids, tokens).any())

    def _note_copies(self, count: int) -> None:
        self.thread.copies = count

    def _after_tower(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        self.thread.tower_ran = True

    def _before_composite(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        thread = self.thread
        thread.call, thread.records, thread.fresh = None, {}, set()
        thread.tower_ran, thread.found_visual = False, None
        bound = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        extra = bound.pop("kwargs", {})
        if self.spec.budget.asks_to_drop and not thread.paused:
            unsupported.features_ignored(module, extra)
        thread.inputs = {**bound, **extra}

    def _after_composite(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        thread = self.thread
        thread.inputs, thread.call, thread.records, thread.copies = None, None, {}, 1
        late = (
            thread.tower_ran and thread.found_visual is False and output is not None
        )  # the tower ran inside the decoder
        if late and self.spec.budget.asks_to_drop and not thread.paused:
            raise NothingPrunedError(
                f"the vision tower ran while the decoder did, but no argument of {type(module).__name__} was "
                "recognised as pixels or features, so nothing was pruned; pass them as pixel_values"
            )

    def _before_decoder(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        thread = self.thread
        visual, encoded = None, {}
        if thread.inputs is not None and not thread.paused:
            encoded = encoder_outputs.supplied(
                thread.inputs, thread.encoded, thread.fresh, list(self.spec.anatomy.placeholders)
            )
            if not encoded and thread.tower_ran:  # pictures came by a name that nobody knows
                encoded = {kind: Encoded(kind, {}, None) for kind in self.spec.anatomy.placeholders}
            if encoded:
                unsupported.values_missing(thread.inputs)
                visual = visual_tokens.locate(thread.inputs, self.spec.anatomy, encoded)
            if encoded and visual is None and self.spec.budget.asks_to_drop:
                raise NothingPrunedError(
                    f"{' and '.join(encoded)} features came with a prompt that has none of the placeholder tokens "
                    f"{self.spec.anatomy.placeholders}; expected the processor's input_ids, with one placeholder per "
                    "visual token"
                )
        if not encoded and self.spec.budget.asks_to_drop and not thread.paused:
            given = kwargs if thread.inputs is None else thread.inputs
            encoder_outputs.refuse_merged(
                given.get("inputs_embeds"), thread.encoded, type(self.spec.anatomy.composite).__name__
            )
        thread.found_visual = visual is not None
        thread.call = call = prefill.begin(self.spec, thread.inputs, args, kwargs, visual)
        if call is None:
            return None
        if visual is not None:
            for source in encoded.values():
                # `generate` hands the pictures to the encoder and names them again, as None, to the model.
                call.inputs = {**source.inputs, **{k: v for k, v in call.inputs.items() if v is not None}}
                for name, records in source.records.items():
                    thread.records.setdefault(name, []).extend(records)
            if thread.copies > 1 and thread.fresh >= set(encoded):
                call.copies = (
                    thread.copies
                    if generation.share_feature_rows(visual, thread.copies, kwargs.get("inputs_embeds"))
                    else 1
                )
            self._continued(call, kwargs)
        call.recorded = thread.records
        if not call.cuts:
            return None
        later = any(map(checkpointing.runs_hooks_again, self.spec.anatomy.layers))
        found = intercept_deepstack(kwargs, (call.columns.batch, call.columns.length), later)
        if found is None:
            return None
        call.deepstack, kwargs = found
        return args, kwargs

    def _after_decoder(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        call, self.thread.call = self.thread.call, None
        if call is None:
            return None
        output = call.finish(output)
        if call.visual is not None:
            record = call.record()
            if self.spec.window is not None:
                record.evicted = window.evict(call, self.spec.window)
            self.thread.last = self._last = Pruning(**vars(record))
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
            if thread.paused or (thread.inputs is None and thread.encoding is None):
                return
            if tap.columns and (thread.call is None or not thread.call.cuts):
                return
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
