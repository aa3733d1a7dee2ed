# SPDX-License-Identifier: Apache-2.0
"""PrefillOutputs a model without changing it: the probe for q, k, v of a decoder layer, and taps on modules.

The probe calls a decoder layer on its would-be input with the cache left out, and stops it when it reaches the
attention function. There q, k and v have been through norms, projections, q/k norms and rotation, whatever their names
are. To be asked for the attention function, transformers' registry is wrapped on the first `patch` and restored by the
last `remove`; for every thread that is not probing the wrapper hands out what the registry would.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MethodError
from .transformers_names import attention_functions

_lock = threading.Lock()
_users = 0
_probing = threading.local()


class UnreadableLayerError(MethodError):
    """Queries, keys and values of a layer cannot be read in the way that was asked for."""


@dataclass
class QKV:
    """What a layer hands to its attention function.

    Attributes:
        query: `[B, H, T, dh]`.
        key: `[B, G, T, dh]`, grouped heads not repeated.
        value: `[B, G, T, dv]`.
        scaling: Factor on the dot product.
        softcap: Tanh cap on the logits, or None.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    softcap: float | None


class _StopProbe(Exception):
    """Raised inside a probed layer where it would attend."""

    def __init__(self, probed: QKV) -> None:
        self.probed = probed


def _stop(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> None:
    scaling = kwargs.get("scaling")
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    raise _StopProbe(QKV(query, key, value, float(scaling), kwargs.get("softcap")))


def is_probing() -> bool:
    """Whether the present thread is inside a probe: hooks pass straight through then."""
    return getattr(_probing, "on", False)


@contextmanager
def unwatched() -> Iterator[None]:
    """Hooks of this thread pass straight through inside."""
    before = is_probing()
    _probing.on = True
    try:
        yield
    finally:
        _probing.on = before


def install() -> None:
    """Wraps the registry of attention functions, for the first of several users."""
    global _users
    registry = attention_functions()

    with _lock:
        _users += 1
        if _users > 1:
            return
        original = registry.get_interface
        overridden = "get_interface" in vars(registry)

        def get_interface(attn_implementation: str, default: Callable) -> Callable:
            if torch.compiler.is_dynamo_compiling():  # compiled code is never probed, see `_uncompiled`
                return original(attn_implementation, default)
            if is_probing():
                return _stop
            function, record = original(attn_implementation, default), getattr(_probing, "record", None)
            return function if record is None else _recorded(function, record)

        get_interface.original = original if overridden else None  # type: ignore[attr-defined]
        registry.get_interface = get_interface


def uninstall() -> None:
    """Gives the registry back, after the last user."""
    global _users
    registry = attention_functions()

    with _lock:
        _users -= 1
        if _users > 0:
            return
        original = registry.get_interface.original
        del registry.get_interface
        if original is not None:
            registry.get_interface = original


@contextmanager
def attention_outputs(layers: Sequence[nn.Module], rows: int) -> Iterator[dict[int, Tensor]]:
    """Records what the attention functions of decoder layers return in calls by this thread.

    Args:
        layers: Decoder layers.
        rows: How many of the last columns are recorded.

    Yields:
        dict: Number of a layer to `[B, rows, H * dv]`, heads joined, before the output projection; of the last call.
        Layers without an attention function are not in it.
    """
    seen: dict[int, Tensor] = {}
    mine = threading.get_ident()

    def enter(number: int) -> Callable:
        def hook(module: nn.Module, args: tuple) -> None:
            if not is_probing() and threading.get_ident() == mine:
                _probing.record = lambda output: seen.__setitem__(number, output[:, -rows:].flatten(2))

        return hook

    def leave(module: nn.Module, args: tuple, output: Any) -> None:
        if not is_probing():
            _probing.record = None

    install()
    handles = [layer.register_forward_pre_hook(enter(number)) for number, layer in enumerate(layers)]
    handles += [layer.register_forward_hook(leave, always_call=True) for layer in layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
        uninstall()


def _recorded(function: Callable, record: Callable[[Tensor], None]) -> Callable:
    def attend(*args: Any, **kwargs: Any) -> Any:
        output = function(*args, **kwargs)
        record(output[0])
        return output

    return attend


@torch.no_grad()
def probe(layer: nn.Module, args: tuple, kwargs: dict[str, Any], rope: bool = True) -> QKV:
    """Runs `layer` up to its attention function.

    Args:
        layer: A decoder layer.
        args, kwargs: What the decoder calls it with.
        rope: False replaces the rotation by the identity.

    Raises:
        UnreadableLayerError: The layer has no attention function, or its rotation does not come as
            `position_embeddings`.
    """
    from transformers import Cache

    kwargs = {name: None if isinstance(value, Cache) else value for name, value in kwargs.items()}
    if "use_cache" in kwargs:
        kwargs["use_cache"] = False
    if not rope and kwargs.get("position_embeddings", ()) is not None:  # None: this layer does not rotate
        kwargs["position_embeddings"] = _no_rotation(kwargs.get("position_embeddings"), layer)
    with _gathered(layer) as bare:
        _probing.on = True
        try:
            _uncompiled(bare)(*args, **kwargs)
        except _StopProbe as reached:
            return reached.probed
        finally:
            _probing.on = False
    raise UnreadableLayerError(
        f"a {type(layer).__name__} never reached an attention function (linear attention, convolution or state space): "
        "choose a decision layer that attends"
    )


@contextmanager
def _gathered(layer: nn.Module) -> Iterator[nn.Module]:
    """A layer with its weights: one that FSDP wraps is run inside its wrapper, which could not be left half-way."""
    inner = layer._modules.get("_fsdp_wrapped_module")
    if inner is None:
        yield layer
        return
    from torch.distributed.fsdp import FullyShardedDataParallel

    with FullyShardedDataParallel.summon_full_params(layer, recurse=False, writeback=False):
        yield inner


def _uncompiled(layer: nn.Module) -> Callable:
    """What runs a layer step by step: compiled code would not ask for its attention function."""
    layer = getattr(layer, "_orig_mod", layer)
    forward = getattr(vars(layer).get("forward"), "_torchdynamo_orig_callable", None)
    return layer._call_impl if forward is None else forward


def _no_rotation(rotation: Any, layer: nn.Module) -> tuple[Tensor, Tensor]:
    if not (isinstance(rotation, tuple) and len(rotation) == 2):
        raise UnreadableLayerError(
            f"{type(layer).__name__} does not take its rotation as position_embeddings=(cos, sin), so keys before "
            "rotation "
            "cannot be read; choose the method's variant that reads rotated keys"
        )
    cos, sin = rotation
    # Scaled rotary embeddings (YaRN) carry a factor in cos and sin; it stays, only the angle goes.
    return torch.sqrt(cos.float() ** 2 + sin.float() ** 2).to(cos.dtype), torch.zeros_like(sin)
