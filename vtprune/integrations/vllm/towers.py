# SPDX-License-Identifier: Apache-2.0
"""Cuts inside the vision towers of vLLM's own classes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ...errors import VTPruneError
from ...towers import TowerMethod
from ...towers.arguments import with_states
from ...towers.cut import TowerCut
from ...vision.block_calls import states_of
from . import readers
from .settings import ServingError


def cut(model: Any, method: TowerMethod) -> TowerCut:
    """Lets the later blocks of a model's vision tower run on the patches that a method keeps.

    vLLM calls `forward` itself in modules that it may compile, so the modules' `forward` is replaced, where hooks would
    be passed by.

    Raises:
        ServingError: The tower cannot be cut; the message names the model's class.
    """
    try:
        found = TowerCut(readers.parts(model), method, lambda: True, strict=False)  # small pictures stay whole
    except (VTPruneError, LookupError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise ServingError(f"vtprune: tower on {type(model).__name__}: {reason}; leave tower out") from error
    for module, before, after in found.around():
        _wrap(module, before, after)
    return found


def _wrap(module: nn.Module, before: Callable, after: Callable) -> None:
    """Calls `before` and `after` around a module's `forward`, as hooks would be called."""
    forward = module.forward

    @functools.wraps(forward)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        states = states_of(args, kwargs) if args or kwargs else None
        # Packed sequences come as [N, 1, D].
        thin = isinstance(states, Tensor) and states.dim() == 3 and states.shape[1] == 1 and states.is_floating_point()
        seen = with_states(args, kwargs, states[:, 0]) if thin else (args, kwargs)  # type: ignore[index]
        changed = before(module, *seen)
        if changed is not None:
            args, kwargs = changed
            if thin:
                rows = states_of(args, kwargs)
                assert rows is not None
                args, kwargs = with_states(args, kwargs, rows[:, None])
        output = None
        try:
            output = forward(*args, **kwargs)
        finally:
            new = after(module, args, kwargs, output[:, 0] if thin and output is not None else output)
        if new is None:
            return output
        return new[:, None] if thin else new

    object.__setattr__(module, "forward", wrapper)
