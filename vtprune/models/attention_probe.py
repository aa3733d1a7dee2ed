# SPDX-License-Identifier: Apache-2.0
"""Reads q, k, v and attention outputs of decoder layers without changing the model.

The probe calls a decoder layer with the input it would get and without its cache, and stops it at the attention
function. There q, k and v have passed norms, projections, q/k norms and rotation, whatever the modules are called. To
intercept the attention function, transformers' registry is wrapped by the first `patch` and restored by the last
`remove`; threads that are not probing get what the registry itself returns.
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
    """Queries, keys and values of a layer cannot be read as requested."""


@dataclass
class QKV:
    """Inputs of a layer's attention function.

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
    """Raised instead of computing attention inside a probed layer; carries the inputs."""

    def __init__(self, inputs: QKV) -> None:
        self.inputs = inputs


def _stop(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> None:
    scaling = kwargs.get("scaling")
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    raise _StopProbe(QKV(query, key, value, float(scaling), kwargs.get("softcap")))


def is_probing() -> bool:
    """Whether this thread is inside a probe, where vtprune's hooks do nothing."""
    return getattr(_probing, "on", False)


@contextmanager
def hooks_disabled() -> Iterator[None]:
    """Context in which vtprune's hooks do nothing in this thread."""
    before = is_probing()
    _probing.on = True
    try:
        yield
    finally:
        _probing.on = before


def install() -> None:
    """Wraps the registry of attention functions, unless an earlier user has."""
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
    """Restores the registry of attention functions after its last user."""
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
    """Records the outputs of the attention functions of decoder layers in calls by this thread.

    Args:
        layers: Decoder layers.
        rows: Number of last positions to record.

    Yields:
        dict: Output `[B, rows, H * dv]` of the last call by layer number, heads joined, before the output projection.
        Layers without an attention function are left out.
    """
    outputs: dict[int, Tensor] = {}
    thread = threading.get_ident()

    def enter(number: int) -> Callable:
        def hook(module: nn.Module, args: tuple) -> None:
            if not is_probing() and threading.get_ident() == thread:
                _probing.record = lambda output: outputs.__setitem__(number, output[:, -rows:].flatten(2))

        return hook

    def leave(module: nn.Module, args: tuple, output: Any) -> None:
        if not is_probing():
            _probing.record = None

    install()
    handles = [layer.register_forward_pre_hook(enter(number)) for number, layer in enumerate(layers)]
    handles += [layer.register_forward_hook(leave, always_call=True) for layer in layers]
    try:
        yield outputs
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
        except _StopProbe as stop:
            return stop.inputs
        finally:
            _probing.on = False
    raise UnreadableLayerError(
        f"{type(layer).__name__} calls no attention function (linear attention, convolution or state space); choose a "
        "layer with attention"
    )


@contextmanager
def _gathered(layer: nn.Module) -> Iterator[nn.Module]:
    """Yields a layer with full weights, without its FSDP wrapper, whose forward must not be stopped half-way."""
    inner = layer._modules.get("_fsdp_wrapped_module")
    if inner is None:
        yield layer
        return
    from torch.distributed.fsdp import FullyShardedDataParallel

    with FullyShardedDataParallel.summon_full_params(layer, recurse=False, writeback=False):
        yield inner


def _uncompiled(layer: nn.Module) -> Callable:
    """Eager forward of a layer; compiled code does not look up its attention function."""
    layer = getattr(layer, "_orig_mod", layer)
    forward = getattr(vars(layer).get("forward"), "_torchdynamo_orig_callable", None)
    return layer._call_impl if forward is None else forward


def _no_rotation(rotation: Any, layer: nn.Module) -> tuple[Tensor, Tensor]:
    if not (isinstance(rotation, tuple) and len(rotation) == 2):
        raise UnreadableLayerError(
            f"{type(layer).__name__} does not take its rotation as position_embeddings=(cos, sin), so keys before "
            "rotation cannot be read; choose the method's variant that reads rotated keys"
        )
    cos, sin = rotation
    # Scaled rotary embeddings (YaRN) carry a factor in cos and sin, which is kept.
    return torch.sqrt(cos.float() ** 2 + sin.float() ** 2).to(cos.dtype), torch.zeros_like(sin)
