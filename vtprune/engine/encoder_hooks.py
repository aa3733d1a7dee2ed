# SPDX-License-Identifier: Apache-2.0
"""Hooks of encoders, and of modules that methods read: they record what these compute."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..core.method import Tap
from ..models import attention_probe, encoder_outputs
from ..models.encoder_outputs import Encoded
from ..towers.cut import TowerCut
from . import requests
from .hooks import is_compiled
from .patch_state import PatchState, StateHooks


class EncoderHooks(StateHooks):
    """Hooks of encoders, and of modules that methods read.

    Attributes:
        tower: The hooks that cut the vision tower or count its work, or None.
    """

    def __init__(self, state: PatchState, tower: TowerCut | None) -> None:
        super().__init__(state)
        self.tower = tower

    def recorded(self, kind: str, encode: Callable) -> Callable:
        """A model's method `encode` for features of a kind, whose runs are recorded."""

        def watch(*args: Any, **kwargs: Any) -> Any:
            thread = self.thread
            # Some encoders of clips call that of pictures; and a method that somebody has wrapped survives the patch.
            if thread.encoding is not None or not self.state.is_attached:
                return encode(*args, **kwargs)
            self.state.forget_dead_calls()
            records: dict[str, list] = {}
            thread.encoding = records
            try:
                output, thread.encoded[kind] = encoder_outputs.watch(kind, encode, args, kwargs, records)
            finally:
                thread.encoding = None
            if thread.composite is None:
                self.state.features.add(output, thread.encoded[kind])
            else:
                thread.composite.encoded_kinds.add(kind)
            return output

        uncompiled = torch.compiler.disable(watch, reason="pruning records the inputs of encoders")

        @functools.wraps(encode)
        def watched(*args: Any, **kwargs: Any) -> Any:
            return (uncompiled if is_compiled() else watch)(*args, **kwargs)

        return watched

    def after_tower(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if self.thread.composite is not None:
            self.thread.composite.ran_tower = True
        if self.spec.anatomy.projector is None:
            self.after_projector(module, args, kwargs, output)

    def after_projector(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        self.state.forget_dead_calls()
        if self.thread.composite is None and self.thread.encoding is None:  # called by hand
            self.state.features.add(output, Encoded(next(iter(self.spec.anatomy.placeholders))))

    def watch(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """A layer that a tap watches is about to run."""
        if self.state.drops and not is_compiled():
            self.thread.watch = attention_probe.Watch()
            self.thread.watch.start(kwargs)

    def unwatch(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        self.thread.watch = None
        attention_probe.leave()

    def tap_hook(self, tap: Tap) -> Callable:
        def record(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            thread = self.thread
            store = thread.records if thread.encoding is None else thread.encoding
            outside = thread.composite is None and thread.encoding is None and thread.model is None
            if requests.current(self.state).paused or outside:
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
