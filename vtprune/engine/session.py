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
from ..towers import products
from ..towers.cut import TowerCut
from . import checkpointing, generation, kv_cache, merged, outputs, prefill, requests, window
from .call import CallOptions
from .deepstack import intercept_deepstack
from .hooks import Hook, Override, is_compiled, is_running
from .kv_cache import Caches
from .spec import PruneSpec
from .thread_state import CompositeCall, LazyPruning, ModelCall, ThreadState

_LONGEST_CALL = 30  # seconds that the removal of a patch waits for calls in other threads


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
        self._running: dict[int, CompositeCall] = {}  # calls in progress, by thread
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

    def detach(self) -> None:
        """Ends what the hooks do, also where somebody has wrapped them and they survive the patch."""
        self.is_attached = False
        self.thread.end_decoder_call()

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
            if thread.composite is None:
                self.features.add(output, thread.encoded[kind])
            else:
                thread.composite.encoded_kinds.add(kind)
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
        if self.thread.composite is not None:
            self.thread.composite.ran_tower = True
        if self.spec.anatomy.projector is None:
            self._after_projector(module, args, kwargs, output)

    def _after_projector(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        self._forget_dead_calls()
        if self.thread.composite is None and self.thread.encoding is None:  # called by hand
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
        call = self.thread.decoder
        return call is not None and call.selects

    def _is_refused(self) -> bool:
        """Whether the hook that runs now is that of a refused call inside another, which torch runs nevertheless.

        The mark of the refusal is cleared, so that the hook of the call around it does its work.
        """
        refused, self.thread.is_refused = self.thread.is_refused, False
        return refused or self._selects

    def _before_model(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        self._refuse_call_while_selecting(module)
        thread = self.thread
        self._forget_dead_calls()
        self._refuse_nested(module, thread.model)
        kwargs = parameters_of(module).bind(args, kwargs) if args else kwargs
        call = thread.model = ModelCall(kwargs, self.drops)
        thread.records = {}
        if not call.may_drop:
            return None
        given: Any = kwargs.get("return_dict")
        given = getattr(module.config, "return_dict", True) if given is None else given
        call.as_tuple = not given
        # `outputs` knows fields by their names, which a tuple does not have.
        changes: dict[str, Any] = {"return_dict": True} if call.as_tuple else {}
        routes = self._routes or "output_router_logits" in kwargs
        balances = routes and _requests_output("output_router_logits", kwargs, module)
        if balances or self.spec.anatomy.has_own_head:
            # Heads average over this mask, like the load-balancing loss of experts; dropped tokens leave it later.
            call.head_mask = _own_mask(kwargs)
            if call.head_mask is not None:
                changes["attention_mask"] = call.head_mask
        return ((), {**kwargs, **changes}) if changes else None

    def _after_model(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        if self._is_refused():
            return None
        call, self.thread.model = self.thread.model, None
        if call is None or output is None:
            return output
        pixels = [name for name, value in call.arguments.items() if name.startswith("pixel") and value is not None]
        if pixels and not call.ran_composite and self.drops:
            self._refuse_replaced("composite")
        prefilled = call.prefill
        if prefilled is not None:
            output = outputs.zero_dropped(output, lambda: prefilled.pruning.mask)
        return output.to_tuple() if call.as_tuple and hasattr(output, "to_tuple") else output

    def _before_composite(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self._refuse_call_while_selecting(module)
        thread = self.thread
        self._forget_dead_calls()
        self._refuse_nested(module, thread.composite)
        thread.end_decoder_call()
        if thread.model is None:
            thread.records = {}
        else:
            thread.model.ran_composite = True
        known = parameters_of(module)
        given = known.bind(args, kwargs)
        thread.composite = self._running[threading.get_ident()] = CompositeCall(given, self.drops)
        self.caches.state_of(cache_of(given))  # before the model asks for its length
        if thread.composite.may_drop:
            unsupported.refuse_ignored_features(
                module, {name: value for name, value in given.items() if name not in known.named}
            )

    def _after_composite(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if self._is_refused():
            return
        call = self.thread.end_composite_call()
        self._running.pop(threading.get_ident(), None)
        if call is None or call.has_visual or not call.ran_tower or output is None or not self.drops:
            return
        if call.has_visual is None:
            self._refuse_replaced("decoder")
        raise NothingPrunedError(
            f"the vision tower ran while the decoder did, but no argument of {type(module).__name__} was "
            "recognized as pixels or features, so nothing was pruned; pass the pixels as pixel_values"
        )

    def _before_decoder(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        self._refuse_call_while_selecting(module)
        self._forget_dead_calls()
        thread = self.thread
        self._refuse_nested(module, None if thread.decoder is None else thread.decoder.options)
        kwargs = parameters_of(module).bind(args, kwargs) if args else kwargs
        composite, request, drops = thread.composite, requests.current(self), self.drops
        visual, encoded = None, {}
        if composite is not None and not request.paused and (drops or not unsupported.is_transformed()):
            encoded = self._encoded_in(composite)
            if encoded:
                visual = self._located(composite, encoded)
        if not encoded and drops:
            visual, encoded = self._merged(kwargs)
        if composite is None:
            thread.records = {} if thread.model is None else thread.records
        else:
            composite.has_visual = visual is not None
        arguments = {} if visual is None else thread.arguments
        own_budget = request.budget is not None or request.spec is not None
        options = CallOptions(self.budget, drops, request.question_end, arguments, own_budget, thread.generates)
        thread.end_decoder_call()
        inputs = None if composite is None else composite.arguments
        call = thread.decoder = prefill.begin(request.spec or self.spec, options, self.caches, inputs, kwargs, visual)
        if call is None:
            return None
        if call.visual is not None:
            self._give_features(call, call.visual, encoded, kwargs)
        call.recorded = thread.records
        call.differentiable = torch.is_grad_enabled() and _requests_output("output_hidden_states", kwargs, module)
        return self._intercepted(call, module, kwargs) if call.cuts else None

    def _encoded_in(self, call: CompositeCall) -> dict[str, Encoded]:
        """The encoder runs whose features a call of the composite gets, by kind."""
        known = parameters_of(self.spec.anatomy.composite).named
        # Arguments that the model has no name for are not pixels, whatever they are called.
        named = {name: value for name, value in call.arguments.items() if name in known or name == ENCODER_OUTPUTS}
        kinds = list(self.spec.anatomy.placeholders)
        encoded = encoder_outputs.supplied(named, self.thread.encoded, call.encoded_kinds, kinds)
        if not encoded and call.ran_tower:  # pixels were passed in an argument with an unknown name
            return {kind: Encoded(kind) for kind in kinds}
        return encoded

    def _located(self, call: CompositeCall, encoded: dict[str, Encoded]) -> VisualTokens | None:
        """The visual tokens of a call with encoded features; refuses prompts without placeholders for them."""
        inputs = call.arguments
        unsupported.refuse_tracing(inputs)
        visual = self._layouts.locate(inputs, self.spec.anatomy, encoded)
        for source in encoded.values():
            self.features.remove(source)
        # Some models get the pixels of the prompt again in every step, and ignore them.
        repeated = not call.ran_tower and all(source.total is None for source in encoded.values())
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
            named = {**kwargs, **outer} if thread.composite is None else outer
            unsupported.refuse_packed_rows(named, call.columns.real, call.columns.past)
        elif budget.keep is None and self.drops:
            visual_tokens.refuse_single_placeholders(visual, encoded, str(budget))
        for source in encoded.values():
            # `generate` passes the pixels to the encoder, and None in their place to the model.
            call.inputs = {**source.inputs, **{k: v for k, v in call.inputs.items() if v is not None}}
            for name, records in source.records.items():
                thread.records.setdefault(name, []).extend(records)
        if call.columns.cache is None and call.cuts and kwargs.get("use_cache") is False:
            call.memo = thread.cacheless.follow(call, {} if thread.composite is None else thread.composite.arguments)

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

    def _refuse_nested(self, module: nn.Module, call: ModelCall | CompositeCall | CallOptions | None) -> None:
        """Refuses that a hook of the caller calls a module while a call of it that drops tokens is in progress."""
        if call is not None and call.may_drop and is_running(module):
            self.thread.is_refused = True
            raise UnsupportedModelError(
                f"{type(module).__name__} was called while a call of it is in progress, by a hook or a module of it; "
                "its pruned tokens would be lost: call a copy of the model, or unpatch it first"
            )

    def _forget_dead_calls(self) -> None:
        self.thread.forget_dead_calls(self.spec.anatomy.model, self.spec.anatomy.composite)

    def _merged(self, kwargs: dict) -> tuple[VisualTokens | None, dict[str, Encoded]]:
        """Visual tokens of a call whose features the caller merged into `inputs_embeds`, and their encoder runs.

        Args:
            kwargs: Arguments of the decoder, by name.

        Raises:
            NothingPrunedError: There are merged features, and their positions are unknown.
        """
        thread, anatomy = self.thread, self.spec.anatomy
        outer = {} if thread.model is None else thread.model.arguments
        inputs = kwargs if thread.composite is None else thread.composite.arguments
        columns, states = requests.current(self).visual, kwargs.get("inputs_embeds")
        sources: list[Encoded] = []
        if columns is not None and isinstance(states, torch.Tensor):
            kinds = merged.kinds_from_mask(columns, (states.shape[0], states.shape[1]), anatomy.placeholders)
        else:
            kinds, sources = merged.find(inputs, outer, self.features, anatomy, _virtual_tokens(self.model))
        if kinds is None or not bool(kinds.any()):
            return None, {}
        names = enumerate(anatomy.placeholders, start=1)
        encoded = {name: Encoded(name) for number, name in names if bool((kinds == number).any())}
        if len(sources) == 1 and sources[0].total == int((kinds > 0).sum()):
            encoded = {sources[0].kind: sources[0]}
        return visual_tokens.locate({**outer, **inputs}, anatomy, encoded, kinds), encoded

    def _after_decoder(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        thread = self.thread
        call, thread.decoder = thread.decoder, None
        if call is None:
            return None
        output = call.finish(output)
        if call.visual is None:
            return output
        evicted = [] if self.spec.window is None else window.evict(call, self.spec.window)
        thread.last = self._last = made = LazyPruning(call.recorder(evicted))
        if thread.model is not None:
            thread.model.prefill, mask, past = made, thread.model.head_mask, call.columns.past
            if mask is not None and mask.shape[1] >= past + call.columns.length:
                kept = made.pruning.mask.to(mask.device)
                mask[:, past:][:, : kept.shape[1]].mul_(kept)
        return output

    def wait(self) -> None:
        """Waits until calls in progress in other threads have ended, which need the hooks to their end.

        Raises:
            VTPruneError: A call of this thread is in progress, or one of another does not end.
        """
        composite, here, start = self.spec.anatomy.composite, threading.get_ident(), time.monotonic()

        def runs(thread: int, call: CompositeCall) -> bool:
            """Whether a call is in progress in another thread; taken for granted where it cannot be seen."""
            if thread == here or thread not in sys._current_frames():
                return False
            return not call.was_seen or is_running(composite, thread) is not False

        if here in self._running and is_running(composite):
            raise VTPruneError("the patch cannot be removed inside a call of the model; remove it after the call")
        while any(runs(*item) for item in list(self._running.items())):
            if time.monotonic() - start > _LONGEST_CALL:
                raise VTPruneError(
                    f"the patch cannot be removed: a call of the model in another thread has not ended for "
                    f"{_LONGEST_CALL} seconds"
                )
            time.sleep(0.001)

    def _layer_hook(self, number: int) -> Callable:
        def before_layer(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            call = self.thread.decoder
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
            outside = thread.composite is None and thread.encoding is None and thread.model is None
            if requests.current(self).paused or outside:
                return
            if tap.columns and (thread.decoder is None or not thread.decoder.cuts):
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
