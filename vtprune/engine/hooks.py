# SPDX-License-Identifier: Apache-2.0
"""Forward hooks and replaced methods, the two changes that a patch makes to modules."""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections.abc import Callable
from types import CodeType
from typing import Any

import torch
from torch import nn
from torch._C import _len_torch_function_stack as _function_modes
from torch._C._dynamo import eval_frame as _eval_frame

from ..errors import VTPruneError
from ..models.attention_probe import state as _thread

_GRAPH_BREAK = "which tokens stay depends on values, so the selection breaks the graph; compile without fullgraph"


def is_compiled() -> bool:
    """Whether dynamo traces this call, or would trace the functions that it calls."""
    return torch.compiler.is_dynamo_compiling() or bool(_eval_frame.get_eval_frame_callback())


_calls = threading.local()


def called_by_compiled_code() -> bool:
    """Whether a hook runs now, untraced, for a module whose call dynamo traces."""
    return getattr(_calls, "compiled", False)


class Uncopied:
    """Part of a patch in a module, which can be saved, but not copied or pickled."""

    def __deepcopy__(self, memo: dict) -> Any:
        raise VTPruneError("a patched model cannot be copied: call patch.remove() first, and patch the copy as well")

    def __reduce__(self) -> Any:
        raise VTPruneError(
            "a patched model cannot be pickled: call patch.remove() first; save_pretrained works as it is"
        )


class Hook(Uncopied):
    """A forward hook with a reference to its patch."""

    def __init__(self, owner: Any, function: Callable) -> None:
        self.owner = owner
        self.function = function
        self.uncompiled = torch.compiler.disable(self._run_for_compiled_code, reason=_GRAPH_BREAK)

    def __call__(self, *args: Any) -> Any:
        # Run once a layer and step, so `is_compiled` and the usual case of `_run` are written out.
        if torch.compiler.is_dynamo_compiling() or _eval_frame.get_eval_frame_callback():
            return self.uncompiled(*args)
        return None if _thread.on else self._run(*args) if _function_modes() else self.function(*args)

    def _run(self, *args: Any) -> Any:
        if _thread.on:
            return None
        if not _function_modes():
            return self.function(*args)
        # Such a mode is `torch.set_default_device("cuda")`: numbers for the host would be made on the device.
        with torch.device("cpu"):
            return self.function(*args)

    def _run_for_compiled_code(self, *args: Any) -> Any:
        _calls.compiled = True
        try:
            return self._run(*args)
        finally:
            _calls.compiled = False


class Override:
    """Replaces a method of a module instance until `remove` is called.

    A copy of the module would call the method of the original, so it cannot be copied or pickled.
    """

    def __init__(self, module: nn.Module, name: str, function: Callable) -> None:
        self.module, self.name, self.guard = module, name, f"_vtprune_{name}"
        self.before, self.function = vars(module).get(name), function
        setattr(module, self.guard, Uncopied())  # comes first, so that its error is the one that is raised
        setattr(module, name, function)

    def remove(self) -> None:
        vars(self.module).pop(self.guard, None)
        own = getattr(type(self.module), self.name).__get__(self.module) if self.before is None else self.before
        if vars(self.module).get(f"_old_{self.name}") is self.function:  # accelerate has wrapped it since
            setattr(self.module, f"_old_{self.name}", own)
        if vars(self.module).get(self.name) is not self.function:
            return  # somebody has wrapped it since, and calls the function, which passes straight through from now on
        delattr(self.module, self.name)
        if self.before is not None:
            setattr(self.module, self.name, self.before)


@functools.lru_cache(maxsize=256)
def _code_of(function: Callable) -> CodeType:
    """The code that runs on a call of a function, behind decorators."""
    return inspect.unwrap(function).__code__


def is_running(module: nn.Module, thread: int | None = None) -> bool | None:
    """Whether the forward of a module's class is in progress in a thread; None if that cannot be seen.

    Args:
        module: The module.
        thread: Number of the thread, by default the calling one.
    """
    if "forward" in vars(module) or (thread is None and (is_compiled() or called_by_compiled_code())):
        return None
    code = _code_of(type(module).forward)
    frame = sys._getframe(1) if thread is None else sys._current_frames().get(thread)
    while frame is not None:
        if frame.f_code is code:
            return True
        frame = frame.f_back
    return False


def owner_of(model: nn.Module) -> Any:
    """The patch whose hooks are on a model, or None."""
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, Hook):
                return hook.owner
    return None
