# SPDX-License-Identifier: Apache-2.0
"""Queries, keys and values of vLLM's layers: a layer runs on an input and is stopped before it attends.

The counterpart of `vtprune.models.attention_probe` for the two attention modules of vLLM, whose heads are sharded over
tensor-parallel ranks and are gathered here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...core.tokens import AttentionInputs, Tokens
from ...models import attention_probe
from ...models.attention_probe import QKV
from .settings import ServingError


class _StopProbe(Exception):
    """Raised to stop a layer before it attends."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, softcap: float | None = None) -> None:
        self.found = (query, key, value, scaling, softcap)


class _StopAtAttention(TorchFunctionMode):
    """Stops at PyTorch's own attention, which towers call if they need a mask."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            query, key, value = args[:3]
            raise _StopProbe(query, key, value, (kwargs or {}).get("scale") or query.shape[-1] ** -0.5)
        return func(*args, **(kwargs or {}))


@contextmanager
def _stopping(layer: nn.Module, cls: type, hook: Callable) -> Iterator[None]:
    handles = [m.register_forward_pre_hook(hook, with_kwargs=True) for m in layer.modules() if isinstance(m, cls)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _passed(args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
    """Query, key and value among the arguments of an attention module."""
    return (*args, *(kwargs[name] for name in ("query", "key", "value")[len(args) :]))[:3]


def _all_heads(x: Tensor) -> Tensor:
    """Gathers the heads, in dimension 1, of all tensor-parallel ranks."""
    from vllm.distributed import get_tp_group, model_parallel_is_initialized, tensor_model_parallel_all_gather

    if not model_parallel_is_initialized() or get_tp_group().world_size == 1:
        return x
    return tensor_model_parallel_all_gather(x.contiguous(), dim=1)


def _heads(x: Tensor, heads: int) -> Tensor:
    """`[B, N, H * d]` or `[B, N, H, d]` -> `[B, H, N, d]`."""
    return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)


def transformers_layer(layer: nn.Module, args: tuple, kwargs: dict[str, Any], rope: bool = True) -> QKV:
    """`attention_probe.probe` without a patch, which would have wrapped the attention functions; with all heads."""
    attention_probe.install()
    try:
        found = attention_probe.probe(layer, args, kwargs, rope)
    finally:
        attention_probe.uninstall()
    query, key, value = (_all_heads(x) for x in (found.query, found.key, found.value))
    return QKV(query, key, value, found.scaling, found.softcap)


@torch.no_grad()
def vision(layer: nn.Module, args: tuple, kwargs: dict[str, Any], rope: bool = True) -> QKV:
    """Queries and keys of a layer of vLLM's vision towers; with the signature of `attention_probe.probe`.

    Raises:
        ServingError: The layer never attends.
    """
    from vllm.model_executor.layers.attention.mm_encoder_attention import MMEncoderAttention

    def hook(module: Any, given: tuple, named: dict[str, Any]) -> None:
        query, key, value = _passed(given, named)
        groups = getattr(module, "num_kv_heads", module.num_heads)
        if query.dim() == 2:
            query, key, value = query[None], key[None], value[None]
        raise _StopProbe(_heads(query, module.num_heads), _heads(key, groups), _heads(value, groups), module.scale)

    if not rope:  # replaces the rotation by the identity
        tables = {n: v for n, v in kwargs.items() if n.endswith(("cos", "sin")) and isinstance(v, Tensor)}
        kwargs = {**kwargs, **{n: torch.full_like(v, n.endswith("cos")) for n, v in tables.items()}}
    try:
        with _stopping(layer, MMEncoderAttention, hook), _StopAtAttention():
            layer.forward(*args, **kwargs)
    except _StopProbe as reached:
        query, key, value, scaling, softcap = reached.found
        query, key, value = (_all_heads(x) for x in (query, key, value))
        return QKV(query, key, value, float(scaling), softcap)
    raise ServingError(f"vtprune: a {type(layer).__name__} never reached its attention; use divprune")


def own_keys(decoder: nn.Module, layer: nn.Module, mrope: bool) -> Callable[..., AttentionInputs]:
    """Reads keys and values with one of vLLM's own decoder layers.

    Raises:
        ServingError: The layer has no attention with keys and values per head, or takes what is not known here.
    """
    from vllm.model_executor.layers.attention import Attention

    if not any(isinstance(m, Attention) for m in layer.modules()):
        raise ServingError(f"the first layer, a {type(layer).__name__}, has no attention with keys and values per head")
    wanted = inspect.signature(layer.forward).parameters
    known = {"positions", "hidden_states", "residual"}
    lacking = [n for n, p in wanted.items() if n not in known and p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    if lacking or "hidden_states" not in wanted:
        raise ServingError(f"the first layer, a {type(layer).__name__}, is called with {', '.join(wanted)}")

    def hook(module: Any, given: tuple, named: dict[str, Any]) -> None:
        query, key, value = _passed(given, named)
        key, value = (x.reshape(len(x), module.num_kv_heads, -1) for x in (key, value))
        raise _StopProbe(query, key, value, float(module.impl.scale), getattr(module.impl, "logits_soft_cap", None))

    @torch.no_grad()
    def read(tokens: Tokens, number: int, rope: bool, queries: str) -> AttentionInputs:
        given = {"positions": _positions(tokens, rope, mrope), "hidden_states": tokens.hidden, "residual": None}
        try:
            with _stopping(layer, Attention, hook):
                layer.forward(**{name: value for name, value in given.items() if name in wanted})
        except _StopProbe as reached:
            query, key, value, scaling, _ = reached.found
            return _laid_out(tokens, query, _all_heads(key), _all_heads(value), scaling)
        raise ServingError(f"vtprune: a {type(layer).__name__} never reached its attention; use divprune")

    return read


def transformers_keys(decoder: Any, layer: nn.Module, mrope: bool) -> Callable[..., AttentionInputs]:
    """Reads keys and values with a decoder layer of transformers, inside vLLM's Transformers back end.

    Raises:
        ServingError: The decoder has no rotation that could be computed.
    """
    if not hasattr(decoder, "rotary_emb"):
        raise ServingError(f"the decoder, a {type(decoder).__name__}, has no rotary_emb")

    @torch.no_grad()
    def read(tokens: Tokens, number: int, rope: bool, queries: str) -> AttentionInputs:
        positions = _positions(tokens, rope, mrope)
        positions = positions[:, None] if mrope else positions[None]
        rotation = decoder.rotary_emb(tokens.hidden[None], positions)
        found = transformers_layer(
            layer, (tokens.hidden[None],), {"position_embeddings": rotation, "attention_mask": None}
        )
        query, key, value = (x[0].transpose(0, 1) for x in (found.query, found.key, found.value))
        return _laid_out(tokens, query, key, value, found.scaling)

    return read


def _positions(tokens: Tokens, rope: bool, mrope: bool) -> Tensor:
    """Positions within each image, of which only differences matter; all 0 without rotation."""
    if not mrope:
        return tokens.index if rope else torch.zeros_like(tokens.index)
    places = torch.stack([tokens.frame, tokens.grid_row, tokens.grid_col]).clamp_min(0)
    return places if rope else torch.zeros_like(places)


def _laid_out(tokens: Tokens, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> AttentionInputs:
    """Keys and values of the visual tokens alone, without queries."""
    device = key.device
    none = torch.zeros(0, dtype=torch.long, device=device)
    return AttentionInputs(
        queries=query[:0],
        query_offsets=torch.zeros_like(tokens.offsets),
        query_order=none,
        keys=key,
        values=value,
        key_offsets=tokens.offsets,
        visual=torch.arange(len(key), device=device),
        scaling=scaling,
    )
