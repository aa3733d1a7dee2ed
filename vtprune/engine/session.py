# SPDX-License-Identifier: Apache-2.0
"""Attaches the hooks of a patch to its model, and waits for calls in progress before they are removed.

State of a call is kept per thread until the call returns (`thread_state`); state of a generation is kept with its
cache (`kv_cache`).
"""

from __future__ import annotations

import functools
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from torch import nn

from ..errors import UnsupportedModelError, VTPruneError
from ..models import attention_probe
from ..models.transformers_names import MAKE_CANDIDATES, RUN_PROMPT, encoder_method
from ..towers import products
from ..towers.cut import TowerCut
from . import generation, requests
from .decoder_hooks import DecoderHooks
from .encoder_hooks import EncoderHooks
from .hooks import Hook, Override, is_running
from .model_hooks import ModelHooks
from .patch_state import PatchState
from .spec import PruneSpec
from .thread_state import CompositeCall

_LONGEST_CALL = 30  # seconds that the removal of a patch waits for calls in other threads


class Session:
    """The hooks of one patch on its model.

    Attributes:
        state: State that the hooks share.
        tower: The hooks that cut the vision tower or count its work, or None.
    """

    def __init__(self, model: nn.Module, spec: PruneSpec) -> None:
        self.state = PatchState(model, spec)
        self.tower = self._tower_cut()

    def _tower_cut(self) -> TowerCut | None:
        """The hooks that cut the vision tower or count its work; None if it has no blocks and no cut is requested."""
        spec = self.state.spec
        try:
            return TowerCut(spec.anatomy, spec.tower, lambda: not requests.current(self.state).paused)
        except UnsupportedModelError:
            if spec.tower is not None:
                raise
            return None

    def attach(self, owner: Any, handles: list[Any]) -> None:
        """Registers the hooks on the model.

        Args:
            owner: The object that `hooks.owner_of` returns for the model from now on.
            handles: Gets handles with `remove`, one by one, in the order of registration.
        """
        state, parts = self.state, self.state.spec.anatomy
        state.attached_layers, state.is_attached = tuple(parts.layers), True
        model, decoder, encoder = ModelHooks(state), DecoderHooks(state), EncoderHooks(state, self.tower)
        add = handles.append
        for kind in parts.placeholders:
            name = encoder_method(kind)
            if hasattr(parts.composite, name):
                add(Override(parts.composite, name, encoder.recorded(kind, getattr(parts.composite, name))))

        if hasattr(parts.model, MAKE_CANDIDATES):
            make = generation.delay_first_candidates(getattr(parts.model, MAKE_CANDIDATES), state.prunes)
            add(Override(parts.model, MAKE_CANDIDATES, make))

        if hasattr(parts.model, RUN_PROMPT):
            run = generation.refuse_chunks(getattr(parts.model, RUN_PROMPT), state.prunes, state.caches.state_of)
            add(Override(parts.model, RUN_PROMPT, self._generating(run)))

        def before(module: nn.Module, function: Callable) -> None:
            add(module.register_forward_pre_hook(Hook(owner, function), with_kwargs=True))

        def after(module: nn.Module, function: Callable, always: bool = False) -> None:
            add(module.register_forward_hook(Hook(owner, function), with_kwargs=True, always_call=always))

        if parts.model is not parts.composite:
            before(parts.model, model.before_model)
            after(parts.model, model.after_model, always=True)
        before(parts.composite, model.before_composite)
        before(parts.decoder, decoder.before_decoder)
        after(parts.vision_tower, encoder.after_tower)
        if parts.projector is not None:
            after(parts.projector, encoder.after_projector)
        # In early-fusion models both are the same module: the decoder's hook has to run first.
        after(parts.decoder, decoder.after_decoder)
        after(parts.composite, model.after_composite, always=True)
        for number, layer in enumerate(parts.layers):
            before(layer, decoder.layer_hook(number))
            if number in state.spec.read_layers:
                after(layer, decoder.after_layer, always=True)
        taps = list(state.spec.taps)
        if self.tower is not None:
            handles += self.tower.attach(lambda function: Hook(owner, function))
            handles += [Override(conv, products.NAME, product) for conv, product in self.tower.products()]
            taps.append(self.tower.tap())
        for tap in taps:
            after(tap.module, encoder.tap_hook(tap))
        watched = {tap.module: None for tap in taps if tap.watched}
        for module in watched:
            before(module, encoder.watch)
            after(module, encoder.unwatch, always=True)
        read = (module for number, module in enumerate(parts.layers) if number in state.spec.read_layers)
        for linear in {m: None for module in (*read, *watched) for m in module.modules() if isinstance(m, nn.Linear)}:
            add(Override(linear, "forward", attention_probe.shareable(linear)))

    def _generating(self, run: Callable) -> Callable:
        """A model's `RUN_PROMPT` during which the thread knows that the prompt is that of `generate`."""

        @functools.wraps(run)
        def noted(*args: Any, **kwargs: Any) -> Any:
            self.state.thread.generates = True
            try:
                return run(*args, **kwargs)
            finally:
                self.state.thread.generates = False

        return noted

    def detach(self) -> None:
        """Ends what the hooks do, also where somebody has wrapped them and they survive the patch."""
        self.state.is_attached = False
        self.state.thread.end_decoder_call()

    def wait(self) -> None:
        """Waits until calls in progress in other threads have ended, which need the hooks to their end.

        Raises:
            VTPruneError: A call of this thread is in progress, or one of another does not end.
        """
        composite, here, start = self.state.spec.anatomy.composite, threading.get_ident(), time.monotonic()

        def runs(thread: int, call: CompositeCall) -> bool:
            """Whether a call is in progress in another thread; taken for granted where it cannot be seen."""
            if thread == here or thread not in sys._current_frames():
                return False
            return not call.was_seen or is_running(composite, thread) is not False

        if here in self.state.running and is_running(composite):
            raise VTPruneError("the patch cannot be removed inside a call of the model; remove it after the call")
        while any(runs(*item) for item in list(self.state.running.items())):
            if time.monotonic() - start > _LONGEST_CALL:
                raise VTPruneError(
                    f"the patch cannot be removed: a call of the model in another thread has not ended for "
                    f"{_LONGEST_CALL} seconds"
                )
            time.sleep(0.001)
