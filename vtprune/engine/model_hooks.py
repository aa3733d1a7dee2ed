# SPDX-License-Identifier: Apache-2.0
"""Hooks of the outermost model and of the composite, the module that merges visual features into a prompt."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import nn

from ..errors import NothingPrunedError
from ..models import unsupported
from ..models.arguments import parameters_of
from ..models.transformers_names import cache_of
from . import kv_cache, outputs
from .patch_state import PatchState, StateHooks
from .thread_state import CompositeCall, ModelCall


class ModelHooks(StateHooks):
    """Hooks of the outermost model and of the composite."""

    def __init__(self, state: PatchState) -> None:
        super().__init__(state)
        configs = (getattr(state.model, "config", None), state.spec.anatomy.decoder.config)
        self._routes = any(hasattr(config, "output_router_logits") for config in configs)

    def before_model(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        self.state.refuse_call_while_selecting(module)
        thread = self.thread
        self.state.forget_dead_calls()
        self.state.refuse_nested(module, thread.model)
        kwargs = parameters_of(module).bind(args, kwargs) if args else kwargs
        call = thread.model = ModelCall(kwargs, self.state.drops)
        thread.records = {}
        if not call.may_drop:
            return None
        given: Any = kwargs.get("return_dict")
        given = getattr(module.config, "return_dict", True) if given is None else given
        call.as_tuple = not given
        # `outputs` knows fields by their names, which a tuple does not have.
        changes: dict[str, Any] = {"return_dict": True} if call.as_tuple else {}
        routes = self._routes or "output_router_logits" in kwargs
        balances = routes and requests_output("output_router_logits", kwargs, module)
        if balances or self.spec.anatomy.has_own_head:
            # Heads average over this mask, like the load-balancing loss of experts; dropped tokens leave it later.
            call.head_mask = _own_mask(kwargs)
            if call.head_mask is not None:
                changes["attention_mask"] = call.head_mask
        return ((), {**kwargs, **changes}) if changes else None

    def after_model(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        if self.state.is_refused():
            return None
        call, self.thread.model = self.thread.model, None
        if call is None or output is None:
            return output
        pixels = [name for name, value in call.arguments.items() if name.startswith("pixel") and value is not None]
        if pixels and not call.ran_composite and self.state.drops:
            self.state.refuse_replaced("composite")
        prefilled = call.prefill
        if prefilled is not None:
            output = outputs.zero_dropped(output, lambda: prefilled.pruning.mask)
        return output.to_tuple() if call.as_tuple and hasattr(output, "to_tuple") else output

    def before_composite(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.state.refuse_call_while_selecting(module)
        thread = self.thread
        self.state.forget_dead_calls()
        self.state.refuse_nested(module, thread.composite)
        thread.end_decoder_call()
        if thread.model is None:
            thread.records = {}
        else:
            thread.model.ran_composite = True
        known = parameters_of(module)
        given = known.bind(args, kwargs)
        thread.composite = self.state.running[threading.get_ident()] = CompositeCall(given, self.state.drops)
        self.state.caches.state_of(cache_of(given))  # before the model asks for its length
        if thread.composite.may_drop:
            unsupported.refuse_ignored_features(
                module, {name: value for name, value in given.items() if name not in known.named}
            )

    def after_composite(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if self.state.is_refused():
            return
        call = self.thread.end_composite_call()
        self.state.running.pop(threading.get_ident(), None)
        if call is None or call.has_visual or not call.ran_tower or output is None or not self.state.drops:
            return
        if call.has_visual is None:
            self.state.refuse_replaced("decoder")
        raise NothingPrunedError(
            f"the vision tower ran while the decoder did, but no argument of {type(module).__name__} was "
            "recognized as pixels or features, so nothing was pruned; pass the pixels as pixel_values"
        )


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


def requests_output(name: str, kwargs: dict[str, Any], module: nn.Module) -> bool:
    """Whether a call, or else the model's config, requests an output."""
    given = kwargs.get(name)
    if given is not None:
        return given is not False
    config: Any = getattr(module, "config", None)
    return any(getattr(c, name, False) for c in (config, getattr(config, "text_config", None)) if c is not None)
