# SPDX-License-Identifier: Apache-2.0
"""Hooks of the decoder and of its layers: they find the visual tokens of a call, and begin and end it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..core.log import warn_once
from ..errors import NothingPrunedError
from ..models import attention_probe, encoder_outputs, unsupported, visual_tokens
from ..models.arguments import parameters_of
from ..models.encoder_outputs import Encoded
from ..models.transformers_names import ENCODER_OUTPUTS, cache_of
from ..models.visual_tokens import VisualTokens
from . import checkpointing, kv_cache, merged, prefill, requests, window
from .call import CallOptions
from .deepstack import intercept_deepstack
from .model_hooks import requests_output
from .patch_state import PatchState, StateHooks
from .thread_state import CompositeCall, LazyPruning


class DecoderHooks(StateHooks):
    """Hooks of the decoder and of its layers."""

    def __init__(self, state: PatchState) -> None:
        super().__init__(state)
        self._layouts = visual_tokens.LayoutMemo()

    def before_decoder(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        self.state.refuse_call_while_selecting(module)
        self.state.forget_dead_calls()
        thread = self.thread
        self.state.refuse_nested(module, None if thread.decoder is None else thread.decoder.options)
        kwargs = parameters_of(module).bind(args, kwargs) if args else kwargs
        composite, request, drops = thread.composite, requests.current(self.state), self.state.drops
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
        arguments = {} if visual is None else {**thread.inputs, **thread.outer}
        own_budget = request.budget is not None or request.spec is not None
        options = CallOptions(self.state.budget, drops, request.question_end, arguments, own_budget, thread.generates)
        thread.end_decoder_call()
        call = thread.decoder = prefill.begin(
            request.spec or self.spec, options, self.state.caches, thread.inputs, kwargs, visual
        )
        if call is None:
            return None
        if call.visual is not None:
            self._give_features(call, call.visual, encoded, kwargs)
        call.recorded = thread.records
        call.differentiable = torch.is_grad_enabled() and requests_output("output_hidden_states", kwargs, module)
        return self._intercepted(call, module, kwargs) if call.cuts else None

    def after_decoder(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        thread = self.thread
        call, thread.decoder = thread.decoder, None
        if call is None:
            return None
        output = call.finish(output)
        if call.visual is None:
            return output
        evicted = [] if self.spec.window is None else window.evict(call, self.spec.window)
        thread.last = self.state.newest = made = LazyPruning(call.recorder(evicted))
        if thread.model is not None:
            thread.model.prefill, mask, past = made, thread.model.head_mask, call.columns.past
            if mask is not None and mask.shape[1] >= past + call.columns.length:
                kept = made.pruning.mask.to(mask.device)
                mask[:, past:][:, : kept.shape[1]].mul_(kept)
        return output

    def layer_hook(self, number: int) -> Callable:
        def before_layer(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            call = self.thread.decoder
            if call is None:
                return checkpointing.replay(number, module, args, kwargs)
            if call.selects:  # the method runs a layer
                return None
            return call.before_layer(number, module, args, kwargs)

        return before_layer

    def after_layer(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        attention_probe.leave()

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
            self.state.features.remove(source)
        # Some models get the pixels of the prompt again in every step, and ignore them.
        repeated = not call.ran_tower and all(source.total is None for source in encoded.values())
        repeated = repeated and bool(kv_cache.length(cache_of(inputs)))
        if visual is None and self.state.drops and not repeated:
            raise NothingPrunedError(
                f"{' and '.join(encoded)} features were passed with a prompt without the placeholder tokens "
                f"{self.spec.anatomy.placeholders}; expected the processor's input_ids, with one placeholder per "
                "visual token"
            )
        return visual

    def _merged(self, kwargs: dict) -> tuple[VisualTokens | None, dict[str, Encoded]]:
        """Visual tokens of a call whose features the caller merged into `inputs_embeds`, and their encoder runs.

        Args:
            kwargs: Arguments of the decoder, by name.

        Raises:
            NothingPrunedError: There are merged features, and their positions are unknown.
        """
        thread, anatomy = self.thread, self.spec.anatomy
        outer, inputs = thread.outer, kwargs if thread.composite is None else thread.inputs
        columns, states = requests.current(self.state).visual, kwargs.get("inputs_embeds")
        sources: list[Encoded] = []
        if columns is not None and isinstance(states, torch.Tensor):
            kinds = merged.kinds_from_mask(columns, (states.shape[0], states.shape[1]), anatomy.placeholders)
        else:
            kinds, sources = merged.find(inputs, outer, self.state.features, anatomy, _virtual_tokens(self.state.model))
        if kinds is None or not bool(kinds.any()):
            return None, {}
        names = enumerate(anatomy.placeholders, start=1)
        encoded = {name: Encoded(name) for number, name in names if bool((kinds == number).any())}
        if len(sources) == 1 and sources[0].total == int((kinds > 0).sum()):
            encoded = {sources[0].kind: sources[0]}
        return visual_tokens.locate({**outer, **inputs}, anatomy, encoded, kinds), encoded

    def _give_features(
        self, call: prefill.DecoderCall, visual: VisualTokens, encoded: dict[str, Encoded], kwargs: dict
    ) -> None:
        """Gives a prefill the arguments and records of the encoder runs that its features come from.

        Refuses calls in which pruning these features would have no effect or a wrong one.
        """
        thread, outer, budget = self.thread, call.options.arguments, call.options.budget
        if call.cuts:
            self.state.refuse_replaced_layers()
            named = {**kwargs, **outer} if thread.composite is None else outer
            unsupported.refuse_packed_rows(named, call.columns.real, call.columns.past)
        elif budget.keep is None and self.state.drops:
            visual_tokens.refuse_single_placeholders(visual, encoded, str(budget))
        for source in encoded.values():
            # `generate` passes the pixels to the encoder, and None in their place to the model.
            call.inputs = {**source.inputs, **{k: v for k, v in call.inputs.items() if v is not None}}
            for name, records in source.records.items():
                thread.records.setdefault(name, []).extend(records)
        if call.columns.cache is None and call.cuts and kwargs.get("use_cache") is False:
            call.memo = thread.cacheless.follow(call, thread.inputs)

    def _intercepted(self, call: prefill.DecoderCall, module: nn.Module, kwargs: dict) -> tuple[tuple, dict] | None:
        """The decoder's arguments in a call with cuts, which cut its DeepStack features; None without these."""
        if call.differentiable and requests_output("output_attentions", kwargs, module):
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


def _virtual_tokens(model: nn.Module) -> int:
    """Number of virtual tokens that an adapter prepends to every prompt (PEFT's prompt tuning)."""
    config: Any = getattr(model, "active_peft_config", None)
    return int(getattr(config, "num_virtual_tokens", 0) or 0) if getattr(config, "is_prompt_learning", False) else 0
