# SPDX-License-Identifier: Apache-2.0
"""The calls in progress in one thread, from the outermost model's to the decoder's, and what outlives them."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..models.attention_probe import Watch
from ..models.encoder_outputs import Encoded
from ..report.pruning import Pruning
from ..report.record import PruningRecord
from .cacheless import Generations
from .hooks import is_running
from .prefill import DecoderCall


class LazyPruning:
    """The `Pruning` of a prefill, built on first access."""

    def __init__(self, make: Callable[[], PruningRecord]) -> None:
        self._make = make

    @functools.cached_property
    def pruning(self) -> Pruning:
        """The record with its report."""
        return Pruning(**vars(self._make()))


@dataclass
class ModuleCall:
    """A call of a module.

    Attributes:
        arguments: Its keyword arguments.
        may_drop: Whether it may drop tokens.
        was_seen: Whether its forward was seen on the stack, where a compiled one cannot be seen.
    """

    arguments: dict[str, Any]
    may_drop: bool
    was_seen: bool = False

    def is_dead(self, module: nn.Module) -> bool:
        """Whether an interrupt ended the call of `module`, after which torch runs no hooks."""
        runs = is_running(module)
        was_seen, self.was_seen = self.was_seen, self.was_seen or bool(runs)
        return was_seen and runs is False


@dataclass
class ModelCall(ModuleCall):
    """A call of the outermost model, where that is not the composite itself.

    Attributes:
        as_tuple: Whether its caller asked for a tuple, and the model was asked for a dictionary instead.
        head_mask: Its attention mask `[B, past + T]`, if what follows the decoder may read it.
        prefill: The last prefill in it.
        ran_composite: Whether it called the composite.
    """

    as_tuple: bool = False
    head_mask: Tensor | None = None
    prefill: LazyPruning | None = None
    ran_composite: bool = False


@dataclass
class CompositeCall(ModuleCall):
    """A call of the composite, the module that merges visual features into the embeddings of a prompt.

    Attributes:
        encoded_kinds: Kinds of features that were encoded in it.
        ran_tower: Whether it called the vision tower.
        has_visual: Whether visual tokens were found in it; None before its decoder is called.
    """

    encoded_kinds: set[str] = field(default_factory=set)
    ran_tower: bool = False
    has_visual: bool | None = None


class ThreadState(threading.local):
    """State of a patched model in one thread.

    Attributes:
        model, composite, decoder: The call in progress of each, or None.
        records: Records of taps in the calls in progress, by name of the tap.
        encoding: Records of taps in the encoder run in progress, or None.
        encoded: The last encoder run of each kind of features.
        watch: What is recorded of a layer that is running for a tap, or None.
        generates: Whether `generate` is running a prompt.
        is_refused: Whether a call inside another was refused, whose hooks are still to run.
        last: The last prefill.
        cacheless: Generations without a cache.
    """

    def __init__(self) -> None:
        self.model: ModelCall | None = None
        self.composite: CompositeCall | None = None
        self.decoder: DecoderCall | None = None
        self.records: dict[str, list] = {}
        self.encoding: dict[str, list] | None = None
        self.encoded: dict[str, Encoded] = {}
        self.watch: Watch | None = None
        self.generates = False
        self.is_refused = False
        self.last: LazyPruning | None = None
        self.cacheless = Generations()

    @property
    def outer(self) -> dict[str, Any]:
        """Keyword arguments of the outermost model's call; empty if none is in progress."""
        return {} if self.model is None else self.model.arguments

    @property
    def inputs(self) -> dict[str, Any]:
        """Keyword arguments of the composite's call; empty if none is in progress."""
        return {} if self.composite is None else self.composite.arguments

    def end_decoder_call(self) -> None:
        """Forgets the decoder's call, also one that an error or an interrupt left unfinished."""
        call, self.decoder = self.decoder, None
        if call is not None:
            call.stop_reading()

    def end_composite_call(self) -> CompositeCall | None:
        """Forgets the composite's call, and that of the decoder in it.

        Returns:
            CompositeCall: The call that ended; None if none was in progress.
        """
        self.end_decoder_call()
        call, self.composite, self.records = self.composite, None, {}
        return call

    def forget_dead_calls(self, model: nn.Module, composite: nn.Module) -> None:
        """Forgets calls of the two modules that an interrupt ended."""
        if self.model is not None and self.model.is_dead(model):
            self.model, self.records = None, {}
        if self.composite is not None and self.composite.is_dead(composite):
            self.end_composite_call()
