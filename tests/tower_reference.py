# SPDX-License-Identifier: Apache-2.0
"""The reference for cuts inside vision towers: the unpatched tower whose later blocks cannot attend to dropped rows.

Independent of the engine: every block runs on every row, a custom attention function masks the dropped keys, and after
each block the dropped rows are set to the method's reconstruction, computed naively.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

NAME = "tests_hiding_attention"
# Paths of the blocks in the towers of tests/families.py.
BLOCKS = ("blocks", "encoder.layers", "encoder.layer")


def blocks_of(tower: nn.Module) -> nn.ModuleList:
    for path in BLOCKS:
        try:
            return tower.get_submodule(path)  # type: ignore[return-value]
        except AttributeError:
            continue
    raise AssertionError(f"{type(tower).__name__} keeps its blocks elsewhere")


def prefix_of(tower: nn.Module) -> int:
    return int(any("cls_token" in name or "class_embedding" in name for name, _ in tower.named_parameters()))


@dataclass
class Shown:
    """The cut of one tower call.

    Attributes:
        at: Blocks from here on hide the dropped rows.
        kept: Indices of the kept patches of each picture.
        sizes: Patches of each picture.
        rebuild: `(picture, states at the cut, states now, kept) -> states` of all patches; None keeps those at the cut.
    """

    at: int
    kept: list[Tensor]
    sizes: list[int]
    rebuild: Callable[[int, Tensor, Tensor, Tensor], Tensor] | None = None


@contextmanager
def hiding(tower: nn.Module, shown: list[Shown]) -> Iterator[None]:
    """Context in which each call of the tower is cut by its entry in `shown`."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as registry

    blocks, prefix = blocks_of(tower), prefix_of(tower)
    state: dict[str, Any] = {"call": -1}

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
        scale = kwargs.get("scaling")
        logits = query.float() @ key.float().transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if attention_mask is not None:
            assert attention_mask.dtype == torch.bool
            logits = logits.masked_fill(~attention_mask, -torch.inf)
        if state["hide"] is not None:
            start = state["cursor"]
            state["cursor"] = end = start + query.shape[0] * query.shape[2]
            hide = state["hide"].flatten()[start:end].reshape(query.shape[0], -1)
            hide = hide & ~hide.all(1, keepdim=True)  # the output of a window without kept rows is unused
            logits = logits.masked_fill(hide[:, None, None], -torch.inf)
        return (logits.softmax(-1) @ value.float()).to(value.dtype).transpose(1, 2).contiguous(), None

    def rows_of(call: Shown, states: Tensor) -> list[Tensor]:
        """Flat rows of each picture's patches."""
        if states.dim() == 3 and len(states) > 1 or prefix:
            length = states.shape[1]
            return [torch.arange(prefix, length) + i * length for i in range(len(states))]
        return list(torch.arange(sum(call.sizes)).split(call.sizes))

    def before(number: int) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            states = args[0] if args else kwargs["hidden_states"]
            if number == 0:
                state["call"] += 1
            call = shown[state["call"]]
            state["cursor"], state["hide"] = 0, None
            if number == call.at:
                state["cut"] = states
            if number >= call.at:
                hide = torch.zeros(states.shape[:-1].numel(), dtype=torch.bool)
                for rows, kept in zip(rows_of(call, states), call.kept, strict=True):
                    hide[rows] = True
                    hide[rows[kept]] = False
                state["hide"] = hide

        return hook

    def after(number: int) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
            call = shown[state["call"]]
            if number < call.at:
                return None
            states = output[0] if isinstance(output, tuple) else output
            flat, cut = states.reshape(-1, states.shape[-1]).clone(), state["cut"].reshape(-1, states.shape[-1])
            for picture, (rows, kept) in enumerate(zip(rows_of(call, states), call.kept, strict=True)):
                if len(kept) == len(rows):
                    continue
                now, was = flat[rows], cut[rows]
                made = was if call.rebuild is None else call.rebuild(picture, was, now, kept)
                dropped = torch.ones(len(rows), dtype=torch.bool)
                dropped[kept] = False
                flat[rows[dropped]] = made[dropped]
            full = flat.reshape(states.shape)
            return (full, *output[1:]) if isinstance(output, tuple) else full

        return hook

    configs = {id(m.config): m.config for m in tower.modules() if hasattr(m, "config")}.values()
    old = [(config, config._attn_implementation) for config in configs]
    registry.register(NAME, attend)
    for config, _ in old:
        config._attn_implementation = NAME
    handles = [b.register_forward_pre_hook(before(i), with_kwargs=True, prepend=True) for i, b in enumerate(blocks)]
    handles += [b.register_forward_hook(after(i), with_kwargs=True, prepend=True) for i, b in enumerate(blocks)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for config, name in old:
            config._attn_implementation = name
        registry._global_mapping.pop(NAME, None)


def follows_neighbors(picture: int, was: Tensor, now: Tensor, kept: Tensor) -> Tensor:
    """IPCV: the state at the cut plus the mean change of the ten nearest kept patches."""
    out = now.clone()
    for j in range(len(was)):
        if j in kept.tolist():
            continue
        near = (was[kept].double() - was[j].double()).norm(dim=1).topk(min(10, len(kept)), largest=False).indices
        out[j] = was[j] + (now[kept[near]] - was[kept[near]]).mean(0)
    return out


def copies(sources: Callable[[int, Tensor, Tensor], Tensor]) -> Callable:
    """Dropped patches are copies of the patches `sources(picture, states at the cut, kept)`."""

    def rebuild(picture: int, was: Tensor, now: Tensor, kept: Tensor) -> Tensor:
        return now[sources(picture, was, kept)]

    return rebuild
