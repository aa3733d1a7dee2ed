# SPDX-License-Identifier: Apache-2.0
"""The hooks of a patched model, and the state that they share.

State of a call is kept per thread until the call returns; state of a generation is kept with its cache.
"""

from __future__ import annotations

import functools
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..core.budget import Budget
from ..core.log import warn_once
from ..core.method import Tap
from ..errors import MethodError, NothingPrunedError, UnsupportedModelError, VTPruneError
from ..models import attention_probe, encoder_outputs, unsupported, visual_tokens
from ..models.arguments import parameters_of
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
from ..report.record import PruningRecord
from ..towers import products
from ..towers.cut import TowerCut
from . import checkpointing, generation, kv_cache, merged, outputs, prefill, requests, window
from .cacheless import Generations
from .call import CallOptions
from .deepstack import intercept_deepstack
from .hooks import Hook, Override, is_compiled, is_running
from .kv_cache import Caches
from .spec import PruneSpec

_LONGEST_CALL = 30  # seconds that the removal of a patch waits for calls in other threads


class LazyPruning:
    """The `Pruning` of a prefill, built on first access."""

    def __init__(self, make: Callable[[], PruningRecord]) -> None:
        self._make = make

    @functools.cached_property
    def pruning(self) -> Pruning:
        """The record with its report."""
        return Pruning(**vars(self._make()))


class ThreadState(threading.local):
    """State of a patched model in one thread: the calls in progress and the last prefill."""

    def __init__(self) -> None:
        self.outer: dict[str, Any] | None = None  # keyword arguments of the outermost model's call in progress
        self.finished: LazyPruning | None = None  # the last prefill of that call
        self.as_tuple = False  # whether its caller asked for a tuple
        self.head_mask: torch.Tensor | None = None  # its mask, if what follows the decoder may read it
        self.inputs: dict[str, Any] | None = None  # keyword arguments of the composite's call in progress
        self.encoded: dict[str, Encoded] = {}  # the last encoder run of each kind of features
        self.fresh: set[str] = set()  # kinds encoded inside the composite's call in progress
        self.encoding: dict[str, list] | None = None  # records of taps in the encoder run in progress
        self.generates = False  # whether `generate` is running a prompt
        self.tower_ran = False  # whether the vision tower ran inside the composite's call in progress
        # Whether visual tokens were found in it; None before its decoder is called.
        self.found_visual: bool | None = None
        self.call: prefill.DecoderCall | None = None  # the decoder's call in progress
        self.records: dict[str, list] = {}  # records of taps in the call in progress
        self.watch: attention_probe.Watch | None = None  # of the layer of a tap that is running
        self.last: LazyPruning | None = None
        self.cacheless = Generations()
        # Whether forwards of the calls in progress were seen on the stack, where a compiled one cannot be seen.
        self.saw_outer, self.saw_inputs = False, False
        self.may_drop = False  # whether the call in progress may drop tokens
        self.refused = False  # whether a call inside it was refused, whose hooks are still to run
        self.composite_ran = False  # whether the composite ran inside the outermost model's call in progress


class Session:
    """The hooks of one patch and their state.

    Attributes:
        model: The patched model, including wrappers.
        spec: Methods, budget and parts of the model.
        features: Recent outputs of encoders that ran outside a call of the model.
        caches: The KV caches that the model was called with.
        thread: State of the current thread.
    """

    def __init__(self, model: nn.Module, spec: PruneSpec) -> None:
        self.model = model
        self.spec = spec
        self.thread = ThreadState()
        self.features = merged.Features()
        self.caches = Caches()
        self.tower = self._tower_cut()
        # Threads with a call of the composite in progress, and whether its forward was seen on their stacks.
        self._running: dict[int, bool] = {}
        self._attached_layers: tuple[nn.Module, ...] = ()  # those with hooks
        self.is_attached = False
        self._last: LazyPruning | None = None
        self._layouts = visual_tokens.LayoutMemo()
        configs = (getattr(model, "config", None), spec.anatomy.decoder.config)
        self._routes = any(hasattr(config, "output_router_logits") for config in configs)

    @property
    def budget(self) -> Budget:
        """The budget of the current request."""
        return requests.current(self).budget or self.spec.budget

    @property
    def drops(self) -> bool:
        """Whether visual tokens may be dropped in the current request."""
        return not requests.current(self).paused and self.budget.may_drop

    @property
    def last(self) -> Pruning | None:
        """Record of the most recent prefill: of this thread if it ran one, else of any. None before the first."""
        account = self.thread.last or self._last
        return None if account is None else account.pruning

    def _tower_cut(self) -> TowerCut | None:
        """The hooks that cut the vision tower or count its work; None if it has no blocks and no cut is requested."""
        try:
            return TowerCut(self.spec.anatomy, self.spec.tower, lambda: not requests.current(self).paused)
        except UnsupportedModelError:
            if self.spec.tower is not None:
                raise
            return None

    def attach(self, owner: Any, handles: list[Any]) -> None:
        """Registers the hooks on the model.

        Args:
            owner: The object that `hooks.owner_of` returns for the model from now on.
            handles: Gets handles with `remove`, one by one, in the order of registration.
        """
        parts = self.spec.anatomy
        self._attached_layers, self.is_attached = tuple(parts.layers), True
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
            add(Override(parts.model, RUN_PROMPT, self._generating(run)))

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
        # In early-fusion models both are the same module: the decoder's hook has to run first.
        after(parts.decoder, self._after_decoder)
        after(parts.composite, self._after_composite, always=True)
        for number, layer in enumerate(parts.layers):
            before(layer, self._layer_hook(number))
            if number in self.spec.read_layers:
                after(layer, self._after_layer, always=True)
        taps = list(self.spec.taps)
        if self.tower is not None:
            handles += self.tower.attach(lambda function: Hook(owner, function))
            handles += [Override(conv, products.NAME, product) for conv, product in self.tower.products()]
            taps.append(self.tower.tap())
        for tap in taps:
            after(tap.module, self._tap_hook(tap))
        watched = {tap.module: None for tap in taps if tap.watched}
        for module in watched:
            before(module, self._watch)
            after(module, self._unwatch, always=True)
        read = (module for number, module in enumerate(parts.layers) if number in self.spec.read_layers)
        for linear in {m: None for module in (*read, *watched) for m in module.modules() if isinstance(m, nn.Linear)}:
            add(Override(linear, "forward", attention_probe.shareable(linear)))

    def _generating(self, run: Callable) -> Callable:
        """A model's `RUN_PROMPT` during which the thread knows that the prompt is that of `generate`."""

        @functools.wraps(run)
        def noted(*args: Any, **kwargs: Any) -> Any:
            self.thread.generates = True
            try:
                return run(*args, **kwargs)
            finally:
                self.thread.generates = False

        return noted

    def _encoder(self, kind: str, encode: Callable) -> Callable:
        def watch(*args: Any, **kwargs: Any) -> Any:
            thread = self.thread
            # Some encoders of clips call that of pictures; and a method that somebody has wrapped survives the patch.
            if thread.encoding is not None or not self.is_attached:
                return encode(*args, **kwargs)
            self._forget_dead_calls()
            records: dict[str, list] = {}
            thread.encoding = records
            try:
                output, thread.encoded[kind] = encoder_outputs.watch(kind, encode, args, kwargs, records)
            finally:
                thread.encoding = None
            if thread.inputs is None:
                self.features.add(output, thread.encoded[kind])
            thread.fresh.add(kind)
            return output

        uncompiled = torch.compiler.disable(watch, reason="pruning records the inputs of encoders")

        @functools.wraps(encode)
        def watched(*args: Any, **kwargs: Any) -> Any:
            return (uncompiled if is_compiled() else watch)(*args, **kwargs)

        return watched

    def _prunes(self, ids: torch.Tensor) -> bool:
        """Whether a prompt `[B, T]` has visual tokens that are pruned."""
        if not self.drops:
            return False
        return bool((self.spec.anatomy.is_placeholder(ids).sum(1) > (self.budget.keep or 0)).any())

    def _after_tower(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        self.thread.tower_ran = True
        if self.spec.anatomy.projector is None:
            self._after_projector(module, args, kwargs, output)

    def _after_projector(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        self._forget_dead_calls()
        if self.thread.inputs is None and self.thread.encoding is None:  # called by hand
            self.features.add(output, Encoded(next(iter(self.spec.anatomy.placeholders))))

    def _refuse_call_while_selecting(self, module: nn.Module) -> None:
        """Refuses that a method calls the model whose call waits for the method's selection."""
        if self._selects:
            raise MethodError(
                f"{self.spec.method_names} called {type(module).__name__} while it selects tokens of a call of the "
                "same model; read layers by tokens.attention_inputs, or call another copy of the model"
            )

    @property
    def _selects(self) -> bool:
        """Whether a method is selecting tokens in this thread."""
        call = self.thread.call
        return call is not None and call.selects

    def _is_refused(self) -> bool:
        """Whether the hook that runs now is that of a refused call inside another, which torch runs nevertheless.

        The mark of the refusal is cleared, so that the hook of the call around it does its work.
        """
        refused, self.thread.refused = self.thread.refused, False
        return refused or self._selects

    def _before_model(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        self._refuse_call_while_selecting(module)
        thread = self.thread
        self._forget_dead_calls()
        self._refuse_nested(module, thread.outer)
        thread.saw_outer, thread.may_drop = False, self.drops
        kwargs = parameters_of(module).bind(args, kwargs) if args else kwargs
        thread.outer, thread.finished, thread.records, thread.composite_ran = kwargs, None, {}, False
        given: Any = kwargs.get("return_dict")
        given = getattr(module.config, "return_dict", True) if given is None else given
        thread.as_tuple = bool(thread.may_drop and not given)
        # `outputs` knows fields by their names, which a tuple does not have.
        changes: dict[str, Any] = {"return_dict": True} if thread.as_tuple else {}
        routes = self._routes or "output_router_logits" in kwargs
        balances = routes and thread.may_drop and _requests_output("output_router_logits", kwargs, module)
        if balances or (thread.may_drop and self.spec.anatomy.has_own_head):
            # Heads average over this mask, like the load-balancing loss of experts; dropped tokens leave it later.
            thread.head_mask = _own_mask(kwargs)
            if thread.head_mask is not None:
                changes["attention_mask"] = thread.head_mask
        return ((), {**kwargs, **changes}) if changes else None

    def _after_model(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        if self._is_refused():
            return None
        thread = self.thread
        finished, outer = thread.finished, thread.outer or {}
        thread.outer, thread.finished, thread.head_mask = None, None, None
        pixels = [name for name, value in outer.items() if name.startswith("pixel") and value is not None]
        if pixels and not thread.composite_ran and output is not None and self.drops:
            self._refuse_replaced("composite")
        if finished is not None and output is not None:
            output = outputs.zero_dropped(output, lambda: finished.pruning.mask)
        return output.to_tuple() if thread.as_tuple and hasattr(output, "to_tuple") else output

    def _before_composite(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self._refuse_call_while_selecting(module)
        thread = self.thread
        self._forget_dead_calls()
        self._refuse_nested(module, thread.inputs)
        self.end_call()
        thread.saw_inputs, thread.may_drop = False, self.drops
        thread.fresh = set()
        thread.records = thread.records if thread.outer is not None else {}
        thread.tower_ran, thread.found_visual, thread.composite_ran = False, None, True
        self._running[threading.get_ident()] = False
        known = parameters_of(module)
        thread.inputs = known.bind(args, kwargs)
        self.caches.state_of(cache_of(thread.inputs))  # before the model asks for its length
        if self.drops:
            unsupported.refuse_ignored_features(
                module, {name: value for name, value in thread.inputs.items() if name not in known.named}
            )

    def _after_composite(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if self._is_refused():
            return
        thread = self.thread
        self.end_call()
        thread.inputs, thread.records = None, {}
        self._running.pop(threading.get_ident(), None)
        if thread.found_visual or not thread.tower_ran or output is None or not self.drops:
            return
        if thread.found_visual is None:
            self._refuse_replaced("decoder")
        raise NothingPrunedError(
            f"the vision tower ran while the decoder did, but no argument of {type(module).__name__} was "
            "recognized as pixels or features, so nothing was pruned; pass the pixels as pixel_values"
        )

    def _before_decoder(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        self._refuse_call_while_selecting(module)
        self._forget_dead_calls()
        thread = self.thread
        self._refuse_nested(module, thread.call)
        if thread.saw_inputs:
            self._running[threading.get_ident()] = True
        kwargs = parameters_of(module).bind(args, kwargs) if args else kwargs
        visual, encoded = None, {}
        looks = self.drops or not unsupported.is_transformed()
        if thread.inputs is not None and not requests.current(self).paused and looks:
            known = parameters_of(self.spec.anatomy.composite).named
            # Arguments that the model has no name for are not pixels, whatever they are called.
            named = {n: value for n, value in thread.inputs.items() if n in known or n == ENCODER_OUTPUTS}
            encoded = encoder_outputs.supplied(
                named, thread.encoded, thread.fresh, list(self.spec.anatomy.placeholders)
            )
            if not encoded and thread.tower_ran:  # pixels were passed in an argument with an unknown name
                encoded = {kind: Encoded(kind) for kind in self.spec.anatomy.placeholders}
            if encoded:
                visual = self._located(thread.inputs, encoded)
        if not encoded and self.drops:
            visual, encoded = self._merged(kwargs)
        thread.found_visual = visual is not None
        outer = {**(thread.inputs or {}), **(thread.outer or {})} if visual is not None else {}
        request = requests.current(self)
        own_budget = request.budget is not None or request.spec is not None or not self.drops
        spec = request.spec or self.spec
        options = CallOptions(self.budget, request.question_end, outer, own_budget, thread.generates)
        self.end_call()
        thread.call = call = prefill.begin(spec, options, self.caches, thread.inputs, kwargs, visual)
        if call is None:
            return None
        if call.visual is not None:
            self._give_features(call, call.visual, encoded, kwargs)
        call.recorded = thread.records
        call.differentiable = torch.is_grad_enabled() and _requests_output("output_hidden_states", kwargs, module)
        return self._intercepted(call, module, kwargs) if call.cuts else None

    def _located(self, inputs: dict[str, Any], encoded: dict[str, Encoded]) -> VisualTokens | None:
        """The visual tokens of a call with encoded features; refuses prompts without placeholders for them."""
        unsupported.refuse_tracing(inputs)
        visual = self._layouts.locate(inputs, self.spec.anatomy, encoded)
        for source in encoded.values():
            self.features.remove(source)
        # Some models get the pixels of the prompt again in every step, and ignore them.
        repeated = not self.thread.tower_ran and all(source.total is None for source in encoded.values())
        repeated = repeated and bool(kv_cache.length(cache_of(inputs)))
        if visual is None and self.drops and not repeated:
            raise NothingPrunedError(
                f"{' and '.join(encoded)} features were passed with a prompt without the placeholder tokens "
                f"{self.spec.anatomy.placeholders}; expected the processor's input_ids, with one placeholder per "
                "visual token"
            )
        return visual

    def _give_features(
        self, call: prefill.DecoderCall, visual: VisualTokens, encoded: dict[str, Encoded], kwargs: dict
    ) -> None:
        """Gives a prefill the arguments and records of the encoder runs that its features come from.

        Refuses calls in which pruning these features would have no effect or a wrong one.
        """
        thread, outer, budget = self.thread, call.options.arguments, call.options.budget
        if call.cuts:
            self._refuse_replaced_layers()
            named = {**kwargs, **outer} if thread.inputs is None else outer
            unsupported.refuse_packed_rows(named, call.columns.real, call.columns.past)
        elif budget.keep is None and self.drops:
            visual_tokens.refuse_single_placeholders(visual, encoded, str(budget))
        for source in encoded.values():
            # `generate` passes the pixels to the encoder, and None in their place to the model.
            call.inputs = {**source.inputs, **{k: v for k, v in call.inputs.items() if v is not None}}
            for name, records in source.records.items():
                thread.records.setdefault(name, []).extend(records)
        if call.columns.cache is None and call.cuts and kwargs.get("use_cache") is False:
            call.memo = thread.cacheless.follow(call, thread.inputs or {})

    def _intercepted(self, call: prefill.DecoderCall, module: nn.Module, kwargs: dict) -> tuple[tuple, dict] | None:
        """The decoder's arguments in a call with cuts, which cut its DeepStack features; None without these."""
        if call.differentiable and _requests_output("output_attentions", kwargs, module):
            warn_once(
                "attention maps of pruned layers are returned as copies of the unpruned length: gradients are "
                "available for hidden states, but retain_grad() on such a map stays None"
            )
        later = torch.is_grad_enabled() and any(map(checkpointing.runs_hooks_again, self.spec.anatomy.layers))
        found = intercept_deepstack(kwargs, (call.columns.batch, call.columns.length), later)
        if found is None:
            return None
        call.deepstack, kwargs = found
        return (), kwargs

    def _refuse_replaced(self, part: str) -> None:
        """Raises the error of a part that was replaced after the model was patched."""
        raise NothingPrunedError(
            f"the {part} that was patched did not run, so nothing was pruned: it is no longer part of the model; patch "
            "the model again"
        )

    def _refuse_replaced_layers(self) -> None:
        """Refuses a decoder with layers that replaced others after the model was patched."""
        if tuple(map(id, self.spec.anatomy.layers)) != tuple(map(id, self._attached_layers)):
            raise UnsupportedModelError(
                "a layer of the decoder was replaced after the model was patched; patch the model again"
            )

    def _refuse_nested(self, module: nn.Module, running: object) -> None:
        """Refuses that a hook of the caller calls the model while a call that drops tokens is in progress."""
        if running is not None and self.thread.may_drop and is_running(module):
            self.thread.refused = True
            raise UnsupportedModelError(
                f"{type(module).__name__} was called while a call of it is in progress, by a hook or a module of it; "
                "its pruned tokens would be lost: call a copy of the model, or unpatch it first"
            )

    def _forget_dead_calls(self) -> None:
        """Forgets calls that an interrupt ended: torch runs no hooks after a KeyboardInterrupt.

        Only calls that were seen on the stack before: a compiled forward is never seen there.
        """
        thread, parts = self.thread, self.spec.anatomy
        outer = None if thread.outer is None or parts.model is parts.composite else is_running(parts.model)
        inputs = None if thread.inputs is None else is_running(parts.composite)
        if outer is False and thread.saw_outer:
            thread.outer, thread.finished, thread.head_mask, thread.records = None, None, None, {}
        if inputs is False and thread.saw_inputs:
            self.end_call()
            thread.inputs, thread.records = None, {}
        thread.saw_outer, thread.saw_inputs = bool(outer), bool(inputs)

    def _merged(self, kwargs: dict, is_read_again: bool = False) -> tuple[VisualTokens | None, dict[str, Encoded]]:
        """Visual tokens of a call whose features the caller merged into `inputs_embeds`.

        Args:
            kwargs: Arguments of the decoder, by name.
            is_read_again: Whether the embedding table was read again, because the one known had other embeddings.

        Raises:
            NothingPrunedError: There are merged features, and their positions are unknown.
        """
        thread, given = self.thread, requests.current(self).visual
        inputs = kwargs if thread.inputs is None else thread.inputs
        kinds: torch.Tensor | None = None
        sources: list[Encoded] = []
        embeds, states = inputs.get("inputs_embeds"), kwargs.get("inputs_embeds")
        placeholders = self.spec.anatomy.placeholders
        if given is not None and isinstance(states, torch.Tensor):
            kinds = merged.kinds_from_mask(given, (states.shape[0], states.shape[1]), placeholders)
        elif isinstance(embeds, torch.Tensor) and embeds.dim() == 3 and embeds.shape[1] > 1:
            unsupported.refuse_tracing(inputs)
            find = functools.partial(self.features.find_foreign, embeds, self.spec.anatomy.embeddings)
            foreign = attention_probe.without_hooks(find)
            foreign[:, : _virtual_tokens(self.model)] = False
            mask = inputs.get("attention_mask", (thread.outer or {}).get("attention_mask"))
            if isinstance(mask, torch.Tensor) and mask.dim() == 2 and mask.shape[1] >= foreign.shape[1]:
                foreign &= mask[:, -foreign.shape[1] :].bool().cpu()  # padding may hold anything
            is_foreign = bool(foreign.any())
            if not is_foreign and not self.features.recent:
                return None, {}
            kinds = self._known_kinds(inputs, foreign.shape) if is_foreign else None
            if kinds is None:
                found, sources = self.features.match(embeds, foreign if is_foreign else torch.ones_like(foreign))
                if sources and not is_foreign:  # of visual words, which are rows of the embedding table
                    merged.refuse_part(int(found.sum()), [source.total for source in sources])
                names = list(placeholders)
                kinds = found.to(torch.uint8) * (1 + names.index(sources[0].kind) if sources else 1)
            left = int((foreign & (kinds == 0)).sum())
            if left and not is_read_again:
                self.features.forget_table()
                return self._merged(kwargs, is_read_again=True)
            if left:
                merged.refuse_foreign(left)
        if kinds is None or not bool(kinds.any()):
            return None, {}
        encoded = {name: Encoded(name) for i, name in enumerate(placeholders) if bool((kinds == i + 1).any())}
        if len(sources) == 1 and sources[0].total == int((kinds > 0).sum()):
            encoded = {sources[0].kind: sources[0]}
        return visual_tokens.locate({**(thread.outer or {}), **inputs}, self.spec.anatomy, encoded, kinds), encoded

    def _known_kinds(self, inputs: dict, shape: torch.Size) -> torch.Tensor | None:
        """Kinds `[B, T]` of the positions, from token types, or from ids passed to the outermost model; else None."""
        outer = self.thread.outer or {}
        types, ids = inputs.get("mm_token_type_ids", outer.get("mm_token_type_ids")), outer.get("input_ids")
        if isinstance(types, torch.Tensor) and types.shape == shape:
            order = {"image": 1, "video": 2}  # numbers of transformers' processors
            kinds = torch.zeros(shape, dtype=torch.uint8)
            for number, name in enumerate(self.spec.anatomy.placeholders):
                kinds[types.cpu() == order.get(name, 0)] = number + 1 if name in order else 0
            return kinds
        if isinstance(ids, torch.Tensor) and ids.shape == shape:
            return merged.kinds_from_mask(ids, (shape[0], shape[1]), self.spec.anatomy.placeholders)
        return None

    def _after_decoder(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        call, self.thread.call = self.thread.call, None
        if call is None:
            return None
        output = call.finish(output)
        if call.visual is not None:
            thread = self.thread
            evicted = [] if self.spec.window is None else window.evict(call, self.spec.window)
            thread.last = self._last = thread.finished = made = LazyPruning(call.recorder(evicted))
            if thread.head_mask is not None and thread.head_mask.shape[1] >= call.columns.past + call.columns.length:
                kept = made.pruning.mask.to(thread.head_mask.device)
                thread.head_mask[:, call.columns.past :][:, : kept.shape[1]].mul_(kept)
        return output

    def wait(self) -> None:
        """Waits until calls in progress in other threads have ended, which need the hooks to their end.

        Raises:
            VTPruneError: A call of this thread is in progress, or one of another does not end.
        """
        composite, here, start = self.spec.anatomy.composite, threading.get_ident(), time.monotonic()

        def runs(thread: int, was_seen: bool) -> bool:
            """Whether a call is in progress in another thread; taken for granted where it cannot be seen."""
            if thread == here or thread not in sys._current_frames():
                return False
            return not was_seen or is_running(composite, thread) is not False

        if here in self._running and is_running(composite):
            raise VTPruneError("the patch cannot be removed inside a call of the model; remove it after the call")
        while any(runs(*item) for item in list(self._running.items())):
            if time.monotonic() - start > _LONGEST_CALL:
                raise VTPruneError(
                    f"the patch cannot be removed: a call of the model in another thread has not ended for "
                    f"{_LONGEST_CALL} seconds"
                )
            time.sleep(0.001)

    def end_call(self) -> None:
        """Forgets the decoder's call of this thread, also one that an error or an interrupt left unfinished."""
        call, self.thread.call = self.thread.call, None
        if call is not None:
            call.stop_reading()

    def _layer_hook(self, number: int) -> Callable:
        def before_layer(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            call = self.thread.call
            if call is None:
                return checkpointing.replay(number, module, args, kwargs)
            if call.selects:  # the method runs a layer
                return None
            return call.before_layer(number, module, args, kwargs)

        return before_layer

    def _after_layer(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        attention_probe.leave()

    def _watch(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """A layer that a tap watches is about to run."""
        if self.drops and not is_compiled():
            self.thread.watch = attention_probe.Watch()
            self.thread.watch.start(kwargs)

    def _unwatch(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        self.thread.watch = None
        attention_probe.leave()

    def _tap_hook(self, tap: Tap) -> Callable:
        def record(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            thread = self.thread
            store = thread.records if thread.encoding is None else thread.encoding
            outside = thread.inputs is None and thread.encoding is None and thread.outer is None
            if requests.current(self).paused or outside:
                return
            if tap.columns and (thread.call is None or not thread.call.cuts):
                return
            uncut = (args, kwargs) if self.tower is None else self.tower.uncut(module, args, kwargs)
            watch = thread.watch if uncut[1] is kwargs else None  # of a cut tower only the rows left were seen
            with torch.no_grad():
                value = tap.record(*uncut, output, *([watch] if tap.watched else []))
            if value is not None:
                store.setdefault(tap.name, []).append(value)

        return record


def _virtual_tokens(model: nn.Module) -> int:
    """Number of virtual tokens that an adapter prepends to every prompt (PEFT's prompt tuning)."""
    config: Any = getattr(model, "active_peft_config", None)
    return int(getattr(config, "num_virtual_tokens", 0) or 0) if getattr(config, "is_prompt_learning", False) else 0


def _own_mask(kwargs: dict[str, Any]) -> torch.Tensor | None:
    """A copy `[B, past + T]` of the attention mask of a model's call, made if it has none; None if it has another form
    or a cache."""
    ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
    tokens = kwargs.get("inputs_embeds") if ids is None else ids
    if isinstance(mask, torch.Tensor) and mask.dim() == 2:
        return mask.clone()
    if mask is None and isinstance(tokens, torch.Tensor) and not kv_cache.length(cache_of(kwargs)):
        return torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)
    return None


def _requests_output(name: str, kwargs: dict[str, Any], module: nn.Module) -> bool:
    """Whether a call, or else the model's config, requests an output."""
    given = kwargs.get(name)
    if given is not None:
        return given is not False
    config: Any = getattr(module, "config", None)
    return any(getattr(c, name, False) for c in (config, getattr(config, "text_config", None)) if c is not None)
