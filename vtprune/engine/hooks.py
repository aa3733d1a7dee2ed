# SPDX-License-Identifier: Apache-2.0
"""The two things a patch puts on modules: forward hooks, and methods replaced for a while."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._C._dynamo import eval_frame as _eval_frame

from ..errors import VTPruneError
from ..models import attention_probe

_BY_VALUES = (
    "pruning decides by values which columns stay, so the graph ends where it decides; compile without fullgraph"
)


def is_compiled() -> bool:
    """Whether dynamo traces this call, or would trace what it calls."""
    return torch.compiler.is_dynamo_compiling() or bool(_eval_frame.get_eval_frame_callback())


class Hook:
    """A forward hook that knows the patch it belongs to.

    A model that carries one can be saved, but not copied or pickled.
    """

    def __init__(self, owner: Any, function: Callable) -> None:
        self.owner = owner
        self.function = function
        self.uncompiled = torch.compiler.disable(self._run, reason=_BY_VALUES)

    def __call__(self, *args: Any) -> Any:
        return (self.uncompiled if is_compiled() else self._run)(*args)

    def _run(self, *args: Any) -> Any:
        return None if attention_probe.is_probing() else self.function(*args)

    def __deepcopy__(self, memo: dict) -> Any:
        raise VTPruneError("a patched model cannot be copied: call patch.remove() first, and patch the copy as well")

    def __reduce__(self) -> Any:
        raise VTPruneError(
            "a patched model cannot be pickled: call patch.remove() first; save_pretrained works as it is"
        )


class Override:
    """A method of a module instance that is replaced for a while; `remove` puts things as they were."""

    def __init__(self, module: nn.Module, name: str, function: Callable) -> None:
        self.module, self.name = module, name
        self.before = vars(module).get(name)
        setattr(module, name, function)

    def remove(self) -> None:
        delattr(self.module, self.name)
        if self.before is not None:
            setattr(self.module, self.name, self.before)


def owner_of(model: nn.Module) -> Any:
    """The patch whose hooks a model carries, or None."""
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, Hook):
                return hook.owner
    return None
