# SPDX-License-Identifier: Apache-2.0
"""State that the hooks of one patch share, and the calls that they refuse."""

from __future__ import annotations

import torch
from torch import nn

from ..core.budget import Budget
from ..errors import MethodError, NothingPrunedError, UnsupportedModelError
from ..report.pruning import Pruning
from . import merged, requests
from .call import CallOptions
from .hooks import is_running
from .kv_cache import Caches
from .spec import PruneSpec
from .thread_state import CompositeCall, LazyPruning, ModuleCall, ThreadState


class PatchState:
    """State that the hooks of one patch share.

    Attributes:
        model: The patched model, including wrappers.
        spec: Methods, budget and parts of the model.
        features: Recent outputs of encoders that ran outside a call of the model.
        caches: The KV caches that the model was called with.
        thread: State of the current thread.
        running: Calls of the composite in progress, by thread.
        attached_layers: The decoder's layers that have hooks.
        is_attached: Whether the hooks are on the model.
        newest: The most recent prefill of any thread.
    """

    def __init__(self, model: nn.Module, spec: PruneSpec) -> None:
        self.model = model
        self.spec = spec
        self.features = merged.Features()
        self.caches = Caches()
        self.thread = ThreadState()
        self.running: dict[int, CompositeCall] = {}
        self.attached_layers: tuple[nn.Module, ...] = ()
        self.is_attached = False
        self.newest: LazyPruning | None = None

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
        account = self.thread.last or self.newest
        return None if account is None else account.pruning

    def prunes(self, ids: torch.Tensor) -> bool:
        """Whether a prompt `[B, T]` has visual tokens that are pruned."""
        if not self.drops:
            return False
        return bool((self.spec.anatomy.is_placeholder(ids).sum(1) > (self.budget.keep or 0)).any())

    def forget_dead_calls(self) -> None:
        """Forgets calls of this thread that an interrupt ended."""
        self.thread.forget_dead_calls(self.spec.anatomy.model, self.spec.anatomy.composite)

    def refuse_call_while_selecting(self, module: nn.Module) -> None:
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

    def is_refused(self) -> bool:
        """Whether the hook that runs now is that of a refused call inside another, which torch runs nevertheless.

        The mark of the refusal is cleared, so that the hook of the call around it does its work.
        """
        refused, self.thread.is_refused = self.thread.is_refused, False
        return refused or self._selects

    def refuse_nested(self, module: nn.Module, call: ModuleCall | CallOptions | None) -> None:
        """Refuses that a hook of the caller calls a module while a call of it that drops tokens is in progress."""
        if call is not None and call.may_drop and is_running(module):
            self.thread.is_refused = True
            raise UnsupportedModelError(
                f"{type(module).__name__} was called while a call of it is in progress, by a hook or a module of it; "
                "its pruned tokens would be lost: call a copy of the model, or unpatch it first"
            )

    def refuse_replaced(self, part: str) -> None:
        """Raises the error of a part that was replaced after the model was patched."""
        raise NothingPrunedError(
            f"the {part} that was patched did not run, so nothing was pruned: it is no longer part of the model; patch "
            "the model again"
        )

    def refuse_replaced_layers(self) -> None:
        """Refuses a decoder with layers that replaced others after the model was patched."""
        if tuple(map(id, self.spec.anatomy.layers)) != tuple(map(id, self.attached_layers)):
            raise UnsupportedModelError(
                "a layer of the decoder was replaced after the model was patched; patch the model again"
            )


class StateHooks:
    """Hooks over the state of a patch.

    Attributes:
        state: State of the patch.
        spec: Its specification.
        thread: Its state of the current thread.
    """

    def __init__(self, state: PatchState) -> None:
        self.state = state
        self.spec = state.spec
        self.thread = state.thread
