# SPDX-License-Identifier: Apache-2.0
"""Models whose structure says that pruning columns of the prompt would do nothing, or something else than it says.

Each function looks for one such structure and raises `UnsupportedModelError` with the reason; none knows a class name.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import NothingPrunedError, UnsupportedModelError
from .transformers_names import ENCODER_OUTPUTS, takes_cache

_CROSS = re.compile(r"cross_?att|encoder_attn", re.IGNORECASE)


def encoder_decoder(model: nn.Module) -> None:
    """Raises where pictures go into an encoder, and from there to the decoder from the side."""
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} is an encoder-decoder: its visual tokens reach the decoder by cross-attention, "
            "not as columns of its prompt, so there is nothing to remove from the prompt"
        )


def cross_attention(model: nn.Module, decoder: nn.Module) -> None:
    """Raises where decoder layers look at pictures from the side."""
    found = next((name for name, _ in decoder.named_modules() if _CROSS.search(name)), None)
    if found is not None:
        raise UnsupportedModelError(
            f"{type(model).__name__} shows pictures to its decoder by cross-attention ({found}), not as columns of the "
            "prompt, so there is nothing to remove from the prompt"
        )


def own_generate(model: nn.Module) -> None:
    """Raises where generation goes past the model's own forward, and hence would never be pruned."""
    from transformers import GenerationMixin

    generate = getattr(type(model), "generate", GenerationMixin.generate)
    code = getattr(inspect.unwrap(generate), "__code__", None)
    # A function that calls super() holds the class that it was written in.
    if generate is not GenerationMixin.generate and code is not None and "__class__" not in code.co_freevars:
        raise UnsupportedModelError(
            f"{type(model).__name__}.generate calls its language model directly, past the forward that places pictures "
            "in the prompt, so generation would not be pruned; models that leave generate to transformers work"
        )


def block_states(model: nn.Module, layers: nn.ModuleList) -> None:
    """Raises where the decoder itself collects states between its layers (Inkling 2): they would keep all columns."""
    found = next((layer for layer in layers if "block_states" in inspect.signature(layer.forward).parameters), None)
    if found is not None:
        raise UnsupportedModelError(
            f"the decoder of {type(model).__name__} collects states of all columns between its layers and hands them "
            f"to {type(found).__name__} as block_states; columns that are gone could not be taken out of them"
        )


def shared_selection(model: nn.Module, layers: nn.ModuleList) -> None:
    """Raises where a layer attends to the columns that an earlier layer selected (HunYuan V4): a cut moves them."""
    handed = [layer for layer in layers if "prev_topk_indices" in inspect.signature(layer.forward).parameters]
    if handed and any(getattr(module, "skip_topk", False) for module in layers.modules()):
        raise UnsupportedModelError(
            f"layers of {type(model).__name__} attend to the columns that an earlier {type(handed[0]).__name__} "
            "selected (prev_topk_indices), and a cut between the two moves these columns; models whose layers select "
            "for themselves work"
        )


def own_distances(model: nn.Module, layers: nn.ModuleList) -> None:
    """Raises where attention counts the distance of two tokens in slots of its cache (Inkling), not by position ids."""
    found = next((name for name, _ in layers.named_modules() if re.search("rel_logits|relative_", name)), None)
    if found is not None:
        raise UnsupportedModelError(
            f"attention of {type(model).__name__} counts distances between tokens itself ({found}) instead of taking "
            "positions, so what is left after a cut would move closer together"
        )


def second_reader(model: nn.Module, composite: nn.Module) -> None:
    """Raises where a decoder outside the composite could be handed its KV cache (PI0): it would count columns that are
    gone."""
    inside = set(composite.modules())
    for name, module in model.named_modules():
        if module in inside or composite in set(module.modules()) or not hasattr(module, "get_input_embeddings"):
            continue
        if takes_cache(module.forward):
            raise UnsupportedModelError(
                f"{type(model).__name__} has a second decoder ({name}: {type(module).__name__}) that reads the KV "
                "cache of its language model and would count columns in it that are gone; models with one decoder work"
            )


def values_missing(inputs: dict[str, Any]) -> None:
    """Raises where a call is only traced, so that what it keeps could not depend on what it is given."""
    tensors = [x for x in (inputs.get("input_ids"), inputs.get("inputs_embeds")) if isinstance(x, Tensor)]
    how = (
        "exported (torch.export)"
        if torch.compiler.is_exporting()
        else "traced (torch.jit.trace)"
        if torch.jit.is_tracing()
        else "run on tensors without values (meta or fake)"
        if any(x.is_meta or type(x).__name__ == "FakeTensor" for x in tensors)
        else None
    )
    if how is not None:
        raise UnsupportedModelError(
            f"the patched model is being {how}, but which visual tokens stay is decided by values; call patch.remove() "
            "first and do that to the unpatched model, or run the patched one as it is"
        )


def features_ignored(composite: nn.Module, unknown: dict[str, Any]) -> None:
    """Raises where a call brings features in an argument that the model has no name for, and would not look at.

    Args:
        composite: The module that was called.
        unknown: What its forward takes in `**kwargs`.
    """
    given = unknown.get(ENCODER_OUTPUTS)
    if isinstance(given, dict) and any(value is not None for value in given.values()):
        import transformers

        raise NothingPrunedError(
            f"{type(composite).__name__}.forward takes no mm_encoder_outputs in transformers "
            f"{transformers.__version__} and would ignore these features; pass pixels instead, or install a newer "
            "transformers"
        )


def packed_rows(arguments: dict[str, Any], real: Tensor, past: int) -> None:
    """Raises where one row holds several samples: they would share a budget, and one's question would choose the
    other's visual tokens.

    Args:
        arguments: What the caller passed.
        real: `[B, T]` bool on the CPU, False for padding.
        past: Columns of the conversation before this call.
    """
    found = next(_packings(arguments, real, past), None)
    if found is not None:
        raise UnsupportedModelError(
            f"a row of this call holds several samples ({found}): they would share one budget and one question; pass "
            "one sample a row, padded, or run the call inside patch.paused()"
        )


def _packings(arguments: dict[str, Any], real: Tensor, past: int) -> Iterator[str]:
    """Signs of packed rows among a call's arguments."""
    batch, length = real.shape
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            continue
        if re.fullmatch(r"cu_?seq_?len.*", name) and value.numel() > batch + 1:
            yield f"{name} has {value.numel()} entries"
        if name == "seq_idx" and value.numel() > 1 and bool(value.min() != value.max()):
            yield "seq_idx names several"
    positions = arguments.get("position_ids")
    if isinstance(positions, Tensor) and positions.shape[-1] == length:
        first = positions if positions.dim() == 2 else positions.reshape(-1, *positions.shape[-2:])[0]
        for row, mine in zip(first.cpu().expand(batch, -1), real, strict=True):
            if bool((row[mine].diff() < 0).any()):
                yield "position_ids start anew"
    mask = arguments.get("attention_mask")
    mask = mask.get("full_attention", None) if isinstance(mask, dict) else mask
    if isinstance(mask, Tensor) and mask.dim() == 2 and not mask.is_floating_point() and bool(mask.max() > 1):
        yield "attention_mask numbers them"
    if isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[2] == length and mask.shape[3] >= past + length:
        last = torch.where(real, torch.arange(length), 0).amax(1)
        square = mask.expand(batch, -1, -1, -1)[torch.arange(batch), 0, last.to(mask.device)].cpu()  # [B, KV]
        seen = square if square.dtype == torch.bool else square > torch.finfo(square.dtype).min / 2
        if bool((~seen[:, past : past + length] & real & (torch.arange(length) <= last[:, None])).any()):
            yield "attention_mask keeps them apart"
