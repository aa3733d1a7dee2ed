# SPDX-License-Identifier: Apache-2.0
"""`patch`, `unpatch` and `Patch`: what is attached to a model, and how it comes off again.

A patch is a handful of forward hooks on module instances: one before and one after the composite (to see the call's
inputs), one before and one after the decoder, one before each of its layers, and the method's taps. Nothing else of the
model changes. What belongs to a call lives in the calling thread and is gone when the call returns; what belongs to a
generation lives with its cache.
"""

from __future__ import annotations

import functools
import inspect as _inspect
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from . import anatomy as _anatomy
from . import assisted, copies, features, observe, prefill, recompute, refusals, visual_tokens
from .anatomy import Anatomy
from .attached import Hook, Override, is_compiled
from .budget import Budget, check_schedule, mean_share, solve_mean
from .deepstack import own_planes
from .errors import MethodError, NothingPrunedError, UnsupportedModelError, VTPruneError
from .features import Encoded
from .flops import DecoderShape
from .methods import resolve
from .methods.base import Method, Tap
from .report import Pruning


class _Thread(threading.local):
    """What one thread is doing with a patch."""

    def __init__(self) -> None:
        self.inputs: dict[str, Any] | None = None  # keyword arguments of the composite's running call
        self.encoded: dict[str, Encoded] = {}  # the last encoding of each kind of features
        self.fresh: set[str] = set()  # kinds encoded inside the composite's running call
        self.encoding: dict[str, list] | None = None  # taps of the running encoder
        self.copies = 1  # of each sample that `generate` has made, for the call that follows
        self.tower_ran = False  # the vision tower, inside the composite's running call
        self.found: bool | None = None  # whether visual tokens were found in it; None before its decoder is called
        self.call: prefill.DecoderCall | None = None  # the decoder's running call
        self.records: dict[str, list] = {}  # taps of the running call
        self.paused = 0
        self.last: Pruning | None = None
        self.cacheless: tuple | None = None  # the last prefill without a cache, see `_continued`


class Patch:
    """A method at work on a model. Made by `patch`; comes off with `remove` or at the end of a `with` block.

    Attributes:
        model: As it was passed in.
        anatomy: The parts that were found.
        method: The method's instance.
        budget: What was asked for.
        schedule: Where the method cuts this decoder.
    """

    def __init__(self, model: nn.Module, method: Method, budget: Budget, instead_of: Patch | None = None) -> None:
        self.model = model
        self.method = method
        self.budget = budget
        self.anatomy: Anatomy = _anatomy.find(model)
        layers = self.anatomy.num_layers
        self.schedule = tuple(method.schedule(layers))
        check_schedule(self.schedule, layers, type(method).__name__)
        if budget.mean_ratio is not None:
            solve_mean(self.schedule, budget.mean_ratio, layers)  # raises where it cannot be met
        self.renumbers = self._renumbers()
        taps = list(method.taps(self.anatomy))
        self.column_taps = {tap.name for tap in taps if tap.columns}
        self._thread = _Thread()
        self._last: Pruning | None = None
        self._handles: list[Any] = []
        # Only now, when nothing can be refused any more; and before anything is attached: what both replace on a module
        # could not come off in the wrong order.
        if instead_of is not None:
            instead_of.remove()
        self._attach(taps)

    # --- the public face ----------------------------------------------------------------------------------------------

    @property
    def last(self) -> Pruning | None:
        """The most recent prefill: of the calling thread if it ran one, else of any. None before the first."""
        return self._thread.last or self._last

    @contextmanager
    def paused(self) -> Iterator[Patch]:
        """Prefills of the calling thread are not pruned inside; caches that were pruned before go on working."""
        self._thread.paused += 1
        try:
            yield self
        finally:
            self._thread.paused -= 1

    def remove(self) -> None:
        """Takes everything off the model. Calling it again does nothing."""
        if not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        observe.uninstall()

    @property
    def removed(self) -> bool:
        return not self._handles

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        cuts = ", ".join(str(stage.layer) for stage in self.schedule)
        state = "removed" if self.removed else f"cuts before layer {cuts} of {self.anatomy.num_layers}"
        return f"Patch({self.method}, {self.budget}, {state})"

    def __deepcopy__(self, memo: dict) -> Any:
        raise VTPruneError("a patch cannot be copied; patch the other model instead")

    @property
    def mean_ratio(self) -> float:
        """Expected mean share over layer inputs for `ratio` and `mean_ratio` budgets."""
        from .budget import stretch

        if self.budget.keep is not None:
            raise VTPruneError("with keep= the mean ratio depends on the prompt; see patch.last.mean_ratio")
        layers = self.anatomy.num_layers
        ratio = self.budget.ratio or solve_mean(self.schedule, self.budget.mean_ratio or 1.0, layers)
        return mean_share(self.schedule, stretch(self.schedule, ratio), layers)

    def _renumbers(self) -> bool:
        """Whether the method wants survivors renumbered; raises where the model's positions have several axes."""
        policy = getattr(self.method, "positions", "original")
        if policy not in ("original", "compact"):
            raise MethodError(f'{type(self.method).__name__}.positions is {policy!r}; expected "original" or "compact"')
        rope = getattr(self.anatomy.decoder.config, "rope_parameters", None) or {}
        if policy == "compact" and "mrope_section" in str(rope):
            raise MethodError(
                'positions="compact" numbers tokens on one axis, but this model places them by time, height and '
                'width; use positions="original"'
            )
        return policy == "compact"

    # --- facts that the engine asks for
    # ---------------------------------------------------------------------------------

    @property
    def _parameter(self) -> torch.Tensor:
        return next(self.anatomy.decoder.parameters())

    @property
    def dtype(self) -> torch.dtype:
        weight: Any = self.anatomy.embeddings.weight
        return weight.dtype

    @property
    def device(self) -> torch.device:
        return self._parameter.device

    @property
    def attention(self) -> str:
        """Name of the function that makes the decoder's masks: it tells which form of mask its attention takes."""
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

        name = str(getattr(self.anatomy.decoder.config, "_attn_implementation", None) or "eager")
        return getattr(ALL_MASK_ATTENTION_FUNCTIONS.get(name), "__name__", name)

    @property
    def shape(self) -> DecoderShape:
        return DecoderShape.of(self.anatomy.decoder.config, torch.empty((), dtype=self.dtype).element_size())

    # --- hooks
    # ------------------------------------------------------------------------------------------------------------

    def _attach(self, taps: list[Tap]) -> None:
        parts = self.anatomy
        observe.install()
        add = self._handles.append
        for kind in parts.placeholders:
            name = f"get_{kind}_features"
            if hasattr(parts.composite, name):
                add(Override(parts.composite, name, self._encoder(kind, getattr(parts.composite, name))))

        if hasattr(parts.model, assisted.MAKER):
            make = assisted.after_the_prompt(getattr(parts.model, assisted.MAKER), self._prunes)
            add(Override(parts.model, assisted.MAKER, make))
        if hasattr(parts.model, copies.MAKER):
            expand = copies.noting(getattr(parts.model, copies.MAKER), self._note_copies)
            add(Override(parts.model, copies.MAKER, expand))

        def before(module: nn.Module, function: Callable) -> None:
            add(module.register_forward_pre_hook(Hook(self, function), with_kwargs=True))

        def after(module: nn.Module, function: Callable, always: bool = False) -> None:
            add(module.register_forward_hook(Hook(self, function), with_kwargs=True, always_call=always))

        before(parts.composite, self._before_composite)
        before(parts.decoder, self._before_decoder)
        after(parts.vision_tower, self._after_tower)
        # Early-fusion models are both at once: the decoder's call ends first.
        after(parts.decoder, self._after_decoder)
        after(parts.composite, self._after_composite, always=True)
        for number, layer in enumerate(parts.layers):
            before(layer, self._layer_hook(number))
        for tap in taps:
            after(tap.module, self._tap_hook(tap))

    def _encoder(self, kind: str, encode: Callable) -> Callable:
        def watch(*args: Any, **kwargs: Any) -> Any:
            thread = self._thread
            if thread.encoding is not None:  # some encoders of clips call that of pictures, on what are clips
                return encode(*args, **kwargs)
            records: dict[str, list] = {}
            thread.encoding = records
            try:
                output, thread.encoded[kind] = features.watch(kind, encode, args, kwargs, records)
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
        tokens = torch.tensor(list(self.anatomy.placeholders.values()), device=ids.device)
        return not self._thread.paused and bool(torch.isin(ids, tokens).any())

    def _note_copies(self, count: int) -> None:
        self._thread.copies = count

    def _after_tower(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        self._thread.tower_ran = True

    def _before_composite(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        thread = self._thread
        thread.call, thread.records, thread.fresh = None, {}, set()
        thread.tower_ran, thread.found = False, None
        bound = _inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        extra = bound.pop("kwargs", {})
        if self.budget.asks_to_drop and not thread.paused:
            refusals.features_ignored(module, extra)
        thread.inputs = {**bound, **extra}

    def _after_composite(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        thread = self._thread
        thread.inputs, thread.call, thread.records, thread.copies = None, None, {}, 1
        late = thread.tower_ran and thread.found is False and output is not None  # the tower ran inside the decoder
        if late and self.budget.asks_to_drop and not thread.paused:
            raise NothingPrunedError(
                f"the vision tower ran while the decoder did, but no argument of {type(module).__name__} was "
                "recognised as pixels or features, so nothing was pruned; pass them as pixel_values"
            )

    def _before_decoder(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        thread = self._thread
        visual, encoded = None, {}
        if thread.inputs is not None and not thread.paused:
            encoded = features.supplied(thread.inputs, thread.encoded, thread.fresh, list(self.anatomy.placeholders))
            if not encoded and thread.tower_ran:  # pictures came by a name that nobody knows
                encoded = {kind: Encoded(kind, {}, None) for kind in self.anatomy.placeholders}
            if encoded:
                refusals.values_missing(thread.inputs)
                visual = visual_tokens.locate(thread.inputs, self.anatomy, encoded)
            if encoded and visual is None and self.budget.asks_to_drop:
                raise NothingPrunedError(
                    f"{' and '.join(encoded)} features came with a prompt that has none of the placeholder tokens "
                    f"{self.anatomy.placeholders}; expected the processor's input_ids, with one placeholder per "
                    "visual token"
                )
        if not encoded and self.budget.asks_to_drop and not thread.paused:
            given = kwargs if thread.inputs is None else thread.inputs
            features.refuse_merged(given.get("inputs_embeds"), thread.encoded, type(self.anatomy.composite).__name__)
        thread.found = visual is not None
        thread.call = call = prefill.begin(self, thread.inputs, args, kwargs, visual)
        if call is None:
            return None
        if visual is not None:
            for source in encoded.values():
                # `generate` hands the pictures to the encoder and names them again, as None, to the model.
                call.inputs = {**source.inputs, **{k: v for k, v in call.inputs.items() if v is not None}}
                for name, records in source.records.items():
                    thread.records.setdefault(name, []).extend(records)
            if thread.copies > 1 and thread.fresh >= set(encoded):
                call.copies = thread.copies if copies.share(visual, thread.copies, kwargs.get("inputs_embeds")) else 1
            self._continued(call, kwargs)
        call.observed = thread.records
        if not call.counts:
            return None
        later = any(map(recompute.runs_hooks_again, self.anatomy.layers))
        found = own_planes(kwargs, (call.columns.batch, call.columns.length), later)
        if found is None:
            return None
        call.planes, kwargs = found
        return args, kwargs

    def _after_decoder(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        call, self._thread.call = self._thread.call, None
        if call is None:
            return None
        output = call.finish(output)
        if call.visual is not None:
            self._thread.last = self._last = call.pruning()
        return output

    def _layer_hook(self, number: int) -> Callable:
        def before_layer(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            call = self._thread.call
            if call is None:
                return recompute.again(number, module, args, kwargs)
            return call.before_layer(number, module, args, kwargs)

        return before_layer

    def _tap_hook(self, tap: Tap) -> Callable:
        def record(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            thread = self._thread
            store = thread.records if thread.encoding is None else thread.encoding
            if thread.paused or (thread.inputs is None and thread.encoding is None):
                return
            if tap.columns and (thread.call is None or not thread.call.counts):
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
        thread = self._thread
        previous, thread.cacheless = thread.cacheless, None
        ids = call.inputs.get("input_ids")
        if call.columns.cache is not None or ids is None or kwargs.get("use_cache") is not False or not call.counts:
            return
        inputs = thread.inputs or {}
        given = [inputs[n] for n in sorted(inputs) if n.startswith("pixel")]
        given += list((inputs.get("mm_encoder_outputs") or {}).values())
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


def patch(
    model: nn.Module,
    ratio: float | None = None,
    *,
    keep: int | None = None,
    mean_ratio: float | None = None,
    method: str | Method | type[Method] = "iwp",
) -> Patch:
    """Prunes the visual tokens of every prompt that `model` sees from now on.

    Args:
        model: Any transformers vision-language model whose visual tokens are columns of the decoder's prompt.
        ratio: Share of the visual tokens to KEEP, in (0, 1]; `0.1` keeps a tenth, `1.0` all.
        keep: A number of visual tokens per sample instead.
        mean_ratio: Mean share over the inputs of the decoder layers instead, so that methods that cut at different
            depths cost the same.
        method: Name, class or instance of the method.

    Returns:
        Patch: Also a context manager; it replaces an earlier patch of the same model.

    Raises:
        BudgetError: Not exactly one budget, or one that is out of range or cannot be met.
        MethodError: No such method, or a need of it that the model cannot meet.
        UnsupportedModelError: A part of the model was not found.
    """
    chosen = resolve(method)
    budget = Budget(ratio, keep, mean_ratio)
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"model is a {type(model).__name__}; expected a torch.nn.Module from transformers")
    return Patch(model, chosen, budget, instead_of=find_patch(model))


def find_patch(model: nn.Module) -> Patch | None:
    """The patch that a model carries, or None."""
    for module in _anatomy.unwrap(model).modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, Hook):
                return hook.patch
    return None


def unpatch(model: nn.Module) -> None:
    """Removes the patch of a model, if it has one."""
    found = find_patch(model)
    if found is not None:
        found.remove()


def inspect(model: nn.Module) -> Anatomy:
    """The parts of a model that pruning would use; printable."""
    return _anatomy.find(model)
