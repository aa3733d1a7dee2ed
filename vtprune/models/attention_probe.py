# SPDX-License-Identifier: Apache-2.0
"""Reads q, k, v and attention outputs of decoder layers without changing the model.

The probe calls a decoder layer with the input it would get and without its cache, and stops it at the attention
function. There q, k and v have passed norms, projections, q/k norms and rotation, whatever the modules are called. A
layer that runs anyway is watched instead (`Watch`), so that nothing is computed twice. To intercept the attention
function, transformers' registry is wrapped by the first `patch` and restored by the last `remove`; threads that neither
probe nor watch get what the registry itself returns.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import MethodError
from .transformers_names import EXPAND_LATENTS, attention_functions

T = TypeVar("T")


class _Thread(threading.local):
    """What the present thread is doing."""

    on = False  # inside a probe: hooks pass straight through
    watch: Watch | None = None  # the running layer
    share: Callable | None = None  # takes the place of linear maps until the running layer attends
    record: Callable[[Tensor], None] | None = None  # takes what the attention function returns


_lock = threading.Lock()
_users = 0
state = _Thread()


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


def _given(query: Tensor, key: Tensor, value: Tensor, kwargs: dict[str, Any]) -> QKV:
    scaling = kwargs.get("scaling")
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    return QKV(query, key, value, float(scaling), kwargs.get("softcap"))


def _stop(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> None:
    raise _StopProbe(_given(query, key, value, kwargs))


class Projections:
    """Outputs of a layer's linear maps, recorded in one run of the layer and replayed in others on the same states.

    So no projection is computed twice. Position embeddings are applied after the projections, so the runs may differ
    in them. Only maps that `shareable` has prepared are shared; others run again, as do maps that one of the runs gives
    cached latents too (multi-head latent attention).

    Attributes:
        outputs: Every map and its output, in order.
    """

    def __init__(self) -> None:
        self.outputs: list[tuple[nn.Module, Tensor]] = []

    def record(self, linear: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Runs a map and records its output."""
        output = run(x)
        self.outputs.append((linear, output.detach()))
        return output

    def shared(self) -> Callable:
        """Replacement for a linear map's forward: records in the layer's first run, replays in later ones."""
        return self.replay() if self.outputs else self.record

    def replay(self, pick: Callable[[Tensor], Tensor] | None = None) -> Callable:
        """A function that returns what was recorded instead of a map's run; `pick` takes a part of it."""
        left = self.outputs[::-1]

        def replayed(linear: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
            if not left or left[-1][0] is not linear:
                return run(x)
            output = left.pop()[1]
            if pick is not None:
                return pick(output)
            return output if output.shape[:-1] == x.shape[:-1] else run(x)

        return replayed

    def give(self, shape: torch.Size, pick: Callable[[Tensor], Tensor]) -> None:
        """Gives the layer that the calling thread runs next a part of what was recorded; see `leave`.

        Args:
            shape: `[B, T]` of the states that were projected.
            pick: Takes from `[B, T, D]` the rows of the states that are left.
        """
        if self.outputs and all(output.shape[:2] == shape for _, output in self.outputs):
            state.share = self.replay(pick)


def shareable(linear: nn.Module) -> Callable:
    """The forward of a linear map, whose output other runs of the calling thread may share (`Projections`)."""
    run = linear.forward

    @functools.wraps(run)
    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        share = None if torch.compiler.is_dynamo_compiling() else state.share
        return run(x, *args, **kwargs) if share is None else share(linear, run, x)

    return forward


class Watch:
    """Records a layer that runs anyway: its projections, and what it passes to its attention function.

    Attributes:
        calls: Of the attention function; layers that attend in segments make several.
        projections: Of a layer that rotates, to read its queries and keys before rotation.
    """

    def __init__(self) -> None:
        self.calls: list[QKV] = []
        self.projections = Projections()

    def start(self, kwargs: dict[str, Any]) -> None:
        """Watches the layer that the calling thread is about to run with `kwargs`; see `leave`."""
        state.watch = self
        if kwargs.get("position_embeddings") is not None:
            state.share = self.projections.record

    def around(self, function: Callable) -> Callable:
        """`function`, with its queries, keys and values recorded in `calls`."""

        def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.calls.append(_given(query.detach(), key.detach(), value.detach(), kwargs))
            return function(module, query, key, value, *args, **kwargs)

        return attend

    def whole(self, length: int) -> QKV | None:
        """Queries, keys and values of all `length` columns; None where the layer had other keys too, or was not seen.

        Segments are joined in their order.
        """
        if not self.calls or any(call.key.shape[2] != call.query.shape[2] for call in self.calls):
            return None
        first = self.calls[0]
        if len(self.calls) > 1:
            query, key, value = (torch.cat([getattr(c, n) for c in self.calls], 2) for n in ("query", "key", "value"))
            first = QKV(query, key, value, first.scaling, first.softcap)
        return first if first.query.shape[2] == length else None


def leave() -> None:
    """Stops watching and sharing in this thread; call it when the layer has returned or raised."""
    state.watch = state.share = None


def is_probing() -> bool:
    """Whether this thread is inside a probe, where vtprune's hooks do nothing."""
    return state.on


def without_hooks(run: Callable[[], T]) -> T:
    """Returns `run()`, during which vtprune's hooks do nothing in this thread.

    Not a context manager, whose `__exit__` an interruption right before it would skip.
    """
    before = is_probing()
    try:
        state.on = True
        return run()
    finally:
        state.on = before


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
            state.share = None  # behind the projections nothing is recorded or given
            function = original(attn_implementation, default)
            record, watch = state.record, state.watch
            function = function if watch is None else watch.around(function)
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
                state.record = lambda output: outputs.__setitem__(number, output[:, -rows:].flatten(2))

        return hook

    def leave(module: nn.Module, args: tuple, output: Any) -> None:
        if not is_probing():
            state.record = None

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


def own_columns(kwargs: dict[str, Any], length: int, past: int) -> dict[str, Any]:
    """Arguments of a layer for a run without its cache: masks over the cache's slots are those of the call's columns.

    Args:
        kwargs: What the decoder calls the layer with.
        length: Number of columns of the call.
        past: Number of slots that were filled before it.
    """

    def own(mask: Tensor) -> Tensor:
        start = min(past, mask.shape[-1] - length)  # a sliding window has lost the first slots
        return mask[..., start : start + length]

    wide = {
        name: own(value)
        for name, value in kwargs.items()
        if "mask" in name and isinstance(value, Tensor) and value.dim() in (2, 4) and value.shape[-1] > length
    }
    return {**kwargs, **wide} if wide else kwargs


@torch.no_grad()
def expanded(layer: nn.Module, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Expands what a layer with multi-head latent attention caches, as the layer does.

    Args:
        layer: A decoder layer.
        keys, values: `[B, 1, C, r]` what it caches as keys and values: latents of both, and parts of the keys.

    Returns:
        tuple: Keys `[B, G, C, dh]` and values `[B, G, C, dv]`.

    Raises:
        MethodError: The layer has no function of its own that expands them.
    """
    with _gathered(layer) as bare:
        for module in bare.modules():
            if hasattr(module, EXPAND_LATENTS):
                return getattr(module, EXPAND_LATENTS)(keys, values)
    raise MethodError(
        f"{type(layer).__name__} caches {tuple(keys.shape)} as keys, which are not the keys that it attends to, and it "
        f"has no {EXPAND_LATENTS} that makes these, so attention to earlier turns cannot be read; choose a method that "
        "reads no attention, such as 'resprune' or 'divprune'"
    )


@torch.no_grad()
def probe(
    layer: nn.Module, args: tuple, kwargs: dict[str, Any], rope: bool = True, projections: Projections | None = None
) -> QKV:
    """Runs `layer` up to its attention function.

    Args:
        layer: A decoder layer.
        args, kwargs: What the decoder calls it with.
        rope: False replaces the rotation by the identity.
        projections: Of earlier runs on the same states, which this one shares, or adds its own to.

    Raises:
        MethodError: The layer has no attention function, or its rotation does not come as
            `position_embeddings`.
    """
    from transformers import Cache

    kwargs = {name: None if isinstance(value, Cache) else value for name, value in kwargs.items()}
    if "use_cache" in kwargs:
        kwargs["use_cache"] = False
    if not rope and kwargs.get("position_embeddings", ()) is not None:  # None: this layer does not rotate
        kwargs["position_embeddings"] = _no_rotation(kwargs.get("position_embeddings"), layer)
    with _gathered(layer) as bare:
        outer = state.share
        try:  # an interruption anywhere below has to end the probe
            state.on = True
            state.share = None if projections is None else projections.shared()
            _uncompiled(bare)(*args, **kwargs)
        except _StopProbe as stop:
            return stop.inputs
        finally:
            state.on, state.share = False, outer
    raise MethodError(
        f"{type(layer).__name__} calls no attention function (linear attention, convolution or state space); choose a "
        "layer with attention"
    )


_alone: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # layers that do not broadcast over rotations


def probe_both(
    layer: nn.Module, args: tuple, kwargs: dict[str, Any], projections: Projections | None = None
) -> tuple[QKV, QKV] | None:
    """Reads a layer before and after rotation, in a single run.

    Both rotations are stacked to a batch of two, over which the layer's products with them broadcast.

    Args:
        layer, args, kwargs, projections: As for `probe`; of a batch of one.

    Returns:
        tuple: As `probe` returns with `rope=False` and with `rope=True`; None if the layer has to be probed twice.
    """
    rotation = kwargs.get("position_embeddings")
    if layer in _alone or not isinstance(rotation, tuple) or len(rotation) != 2:
        return None
    if any(x.dim() < 3 or x.shape[-3] != 1 for x in rotation):
        return None
    stacked = [torch.cat(both, -3) for both in zip(_no_rotation(rotation, layer), rotation, strict=True)]
    try:
        read = probe(layer, args, {**kwargs, "position_embeddings": tuple(stacked)}, True, projections)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # it joins rotated parts with others, which have a batch of one
        read = None
    if read is None or len(read.query) != 2 or len(read.key) != 2 or len(read.value) != 1:
        _alone.add(layer)
        return None
    queries, keys, rest = read.query.split(1), read.key.split(1), (read.value, read.scaling, read.softcap)
    return QKV(queries[0], keys[0], *rest), QKV(queries[1], keys[1], *rest)


@contextmanager
def _gathered(layer: nn.Module) -> Iterator[nn.Module]:
    """Yields a layer with full weights, without its FSDP wrapper, whose forward must not be stopped half-way.

    Raises:
        MethodError: The weights are sharded over several processes.
    """
    inner = layer._modules.get("_fsdp_wrapped_module")
    if inner is None:
        yield layer
        return
    from torch.distributed.fsdp import FullyShardedDataParallel

    processes = getattr(layer, "world_size", 1)
    if processes > 1:
        # Gathering is a collective call, and a process whose batch has nothing to prune would not make it: its next
        # one, for another layer, would be taken for this one.
        raise MethodError(
            f"the layers are sharded over {processes} processes (FSDP), and this method computes queries and keys of a "
            "layer, for which all processes would have to prune in step; choose a method that reads the prompt only, "
            "such as 'resprune' or 'divprune'"
        )

    with FullyShardedDataParallel.summon_full_params(layer, recurse=False, writeback=False):
        yield inner


def _uncompiled(layer: nn.Module) -> Callable:
    """Eager forward of a layer; compiled code does not look up its attention function."""
    layer = getattr(layer, "_orig_mod", layer)
    forward = getattr(vars(layer).get("forward"), "_torchdynamo_orig_callable", None)
    return layer._call_impl if forward is None else forward


def _no_rotation(rotation: Any, layer: nn.Module) -> tuple[Tensor, Tensor]:
    if not (isinstance(rotation, tuple) and len(rotation) == 2):
        raise MethodError(
            f"{type(layer).__name__} does not take its rotation as position_embeddings=(cos, sin), so keys before "
            "rotation cannot be read; choose the method's variant that reads rotated keys"
        )
    cos, sin = rotation
    # Scaled rotary embeddings (YaRN) carry a factor in cos and sin, which is kept.
    return (cos.float().square().add_(sin.float().square()).sqrt_()).to(cos.dtype), torch.zeros_like(sin)
