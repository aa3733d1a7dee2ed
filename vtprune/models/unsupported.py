# SPDX-License-Identifier: Apache-2.0
"""Refuses models and calls for which pruning the prompt would have no effect or a wrong one.

Each function looks for one structure, never for a class name, and raises `UnsupportedModelError` with the reason.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import NothingPrunedError, UnsupportedModelError
from .attended import attended
from .transformers_names import ENCODER_OUTPUTS, takes_cache

_CROSS = re.compile(r"cross_?att|encoder_attn", re.IGNORECASE)


def refuse_encoder_decoder(model: nn.Module) -> None:
    """Raises for encoder-decoder models, whose visual tokens are not in the decoder's prompt."""
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} is an encoder-decoder: its visual tokens reach the decoder by cross-attention, "
            "not as tokens of its prompt, so there is nothing to prune"
        )


def refuse_cross_attention(model: nn.Module, decoder: nn.Module) -> None:
    """Raises if the decoder gets images by cross-attention."""
    found = next((name for name, _ in decoder.named_modules() if _CROSS.search(name)), None)
    if found is not None:
        raise UnsupportedModelError(
            f"{type(model).__name__} passes images to its decoder by cross-attention ({found}), not as tokens of the "
            "prompt, so there is nothing to prune"
        )


def refuse_own_generate(model: nn.Module) -> None:
    """Raises if the model's `generate` bypasses its forward, and hence pruning."""
    from transformers import GenerationMixin

    generate = getattr(type(model), "generate", GenerationMixin.generate)
    code = getattr(inspect.unwrap(generate), "__code__", None)
    # A function that calls super() has a `__class__` cell.
    if generate is not GenerationMixin.generate and code is not None and "__class__" not in code.co_freevars:
        raise UnsupportedModelError(
            f"{type(model).__name__}.generate calls its language model directly, bypassing the forward that inserts "
            "images into the prompt, so generation would not be pruned; models with the generate of transformers work"
        )


def refuse_block_states(model: nn.Module, layers: nn.ModuleList) -> None:
    """Raises if the decoder collects states between its layers (Inkling 2), which would keep all positions."""
    found = next((layer for layer in layers if "block_states" in inspect.signature(layer.forward).parameters), None)
    if found is not None:
        raise UnsupportedModelError(
            f"the decoder of {type(model).__name__} collects states of all tokens between its layers and passes them "
            f"to {type(found).__name__} as block_states, from which dropped tokens cannot be removed"
        )


def refuse_shared_selection(model: nn.Module, layers: nn.ModuleList) -> None:
    """Raises if layers attend to positions that an earlier layer selected (HunYuan V4); a cut shifts positions."""
    takes = [layer for layer in layers if "prev_topk_indices" in inspect.signature(layer.forward).parameters]
    if takes and any(getattr(module, "skip_topk", False) for module in layers.modules()):
        raise UnsupportedModelError(
            f"layers of {type(model).__name__} attend to the positions that an earlier {type(takes[0]).__name__} "
            "selected (prev_topk_indices), which a cut between the two layers shifts; models whose layers select for "
            "themselves work"
        )


def refuse_relative_attention(model: nn.Module, layers: nn.ModuleList) -> None:
    """Raises if attention takes the distance of two tokens from cache slots (Inkling) instead of position ids."""
    found = next((name for name, _ in layers.named_modules() if re.search("rel_logits|relative_", name)), None)
    if found is not None:
        raise UnsupportedModelError(
            f"attention of {type(model).__name__} takes distances between tokens from cache slots ({found}) instead of "
            "position ids, so a cut would change the distances of the remaining tokens"
        )


def refuse_second_decoder(model: nn.Module, composite: nn.Module) -> None:
    """Raises if a decoder outside the composite takes its KV cache (PI0), in which it would expect all tokens."""
    inside = set(composite.modules())
    for name, module in model.named_modules():
        if module in inside or composite in set(module.modules()) or not hasattr(module, "get_input_embeddings"):
            continue
        if takes_cache(module.forward):
            raise UnsupportedModelError(
                f"{type(model).__name__} has a second decoder ({name}: {type(module).__name__}) that reads the KV "
                "cache of its language model and would expect the dropped tokens in it; models with one decoder work"
            )


def is_transformed() -> bool:
    """Whether a transform of `torch.func` (grad, vmap, ...) runs, whose tensors have no values that can be read."""
    return torch._C._functorch.maybe_current_level() is not None


def refuse_tracing(inputs: dict[str, Any]) -> None:
    """Raises if a call is traced or exported, so that the selection cannot depend on values."""
    tensors = [x for x in (inputs.get("input_ids"), inputs.get("inputs_embeds")) if isinstance(x, Tensor)]
    how = (
        "exported (torch.export)"
        if torch.compiler.is_exporting()
        else "traced (torch.jit.trace)"
        if torch.jit.is_tracing()
        else "run inside a transform (torch.func)"
        if is_transformed()
        else "run on tensors without values (meta or fake)"
        if any(x.is_meta or type(x).__name__ == "FakeTensor" for x in tensors)
        else None
    )
    if how is not None:
        raise UnsupportedModelError(
            f"the patched model is being {how}, but which visual tokens stay depends on values; call patch.remove() "
            "first and do that to the unpatched model, or run the patched one as it is"
        )


def refuse_ignored_features(composite: nn.Module, unknown: dict[str, Any]) -> None:
    """Raises if a call passes features in an argument that the model does not have and would ignore.

    Args:
        composite: The module that was called.
        unknown: Arguments that its forward takes in `**kwargs`.
    """
    given = unknown.get(ENCODER_OUTPUTS)
    if isinstance(given, dict) and any(value is not None for value in given.values()):
        import transformers

        raise NothingPrunedError(
            f"{type(composite).__name__}.forward takes no mm_encoder_outputs in transformers "
            f"{transformers.__version__} and would ignore these features; pass pixels instead, or install a newer "
            "transformers"
        )


def refuse_packed_rows(arguments: dict[str, Any], real: Tensor, past: int) -> None:
    """Raises if one row holds several samples, which would share one budget and one question.

    Args:
        arguments: Arguments of the call.
        real: `[B, T]` bool on the CPU, False for padding.
        past: Length of the conversation before this call.
    """
    found = next(_packings(arguments, real, past), None)
    if found is not None:
        raise UnsupportedModelError(
            f"a row of this call holds several samples ({found}): they would share one budget and one question; pass "
            "one sample a row, padded, or run the call inside patch.paused()"
        )


def _packings(arguments: dict[str, Any], real: Tensor, past: int) -> Iterator[str]:
    """Yields the signs of packed rows among a call's arguments."""
    batch, length = real.shape
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            continue
        if name.startswith("cu") and re.fullmatch(r"cu_?seq_?len.*", name) and value.numel() > batch + 1:
            yield f"{name} has {value.numel()} entries"
        if name == "seq_idx" and value.numel() > 1 and bool(value.min() != value.max()):
            yield "seq_idx has several values"
    positions = arguments.get("position_ids")
    if isinstance(positions, Tensor) and positions.shape[-1] == length:
        first = positions if positions.dim() == 2 else positions.reshape(-1, *positions.shape[-2:])[0]
        for row, tokens in zip(first.cpu().expand(batch, -1), real, strict=True):
            row = row if bool(tokens.all()) else row[tokens]
            # Places in a picture may begin at 0 again (HunYuan-VL); text after it goes on from the row's length.
            restarts = bool((row[1:] < row[:-1]).any())
            if restarts and int(row[-1]) != past + len(row) - 1:
                yield "position_ids restart"
    mask = arguments.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        if not mask.is_floating_point() and int(mask.max()) > 1:
            yield "attention_mask has values above 1"
        return
    mask = mask.get("full_attention") if isinstance(mask, dict) else mask
    columns = torch.arange(length)
    last = torch.where(real, columns, 0).amax(1)
    seen = attended(mask, batch, length, last)
    if seen is None or seen.shape[2] < past + length:
        return
    hidden = ~seen[:, 0, past : past + length].cpu() & real & (columns <= last[:, None])
    nearest = torch.where(hidden, columns, -1).amax(1)
    rows = nearest >= 0
    # Behind a sliding window, the token after the nearest hidden one sees that one; the first of a sample does not.
    after = attended(mask, batch, length, (nearest + 1).clamp(max=length - 1))
    assert after is not None
    if bool((rows & ~after[torch.arange(batch), 0, past + nearest.clamp(min=0)].cpu()).any()):
        yield "attention_mask hides earlier tokens of the row"
