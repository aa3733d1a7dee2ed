# SPDX-License-Identifier: Apache-2.0
"""Distances between a pruned and an unpruned model: last hidden states and next-token distributions."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import VTPruneError
from ..models import anatomy, attention_probe

NO_PICTURES = "no prompt has a visual token; expected batches with pictures, as the processor returns them"


def last_positions(inputs: Mapping[str, Any]) -> Tensor:
    """`[B]` position of the last prompt token of every sample, from `attention_mask` if there is one."""
    mask = inputs.get("attention_mask")
    if mask is None:
        batch, length = inputs["input_ids"].shape
        return torch.full((batch,), length - 1)
    return (mask.bool().cpu() * torch.arange(mask.shape[1])).amax(1)


@torch.no_grad()
def next_token_logits(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """Logits of the token that follows each prompt.

    Args:
        model: A vision-language model, patched or not.
        inputs: Keyword arguments of its call, for `[B, T]` token ids.

    Returns:
        Tensor: `[B, V]` float32.

    Raises:
        VTPruneError: There is NaN among them.
    """
    positions = last_positions(inputs)
    length = inputs["input_ids"].shape[1]
    one = bool((positions == length - 1).all()) and "logits_to_keep" in inspect.signature(model.forward).parameters
    logits = model(**inputs, **({"logits_to_keep": 1} if one else {})).logits
    where = torch.full_like(positions, -1) if one else positions
    logits = logits[torch.arange(len(positions)), where.to(logits.device)].float()
    refuse_nan(logits)
    return logits


def refuse_nan(logits: Tensor) -> None:
    """Raises `VTPruneError` if there is NaN among logits, of which nothing can be said."""
    if bool(logits.isnan().any()):
        raise VTPruneError("the model's logits are NaN; check its weights, or load it in float32 (--dtype float32)")


@torch.no_grad()
def last_states(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """Hidden state of each prompt's last token after the decoder's last layer and final norm.

    Args:
        model: A vision-language model, patched or not.
        inputs: Keyword arguments of its call.

    Returns:
        Tensor: `[B, D]` float32.
    """
    with _decoder_states(model) as seen:
        model(**inputs)
    return _at(seen[-1], last_positions(inputs))


@dataclass(frozen=True)
class PrefillOutputs:
    """Outputs of the prefill of a single prompt.

    Attributes:
        logits: `[1, V]` float32 logits of the next token.
        state: `[1, D]` float32 hidden state of the last token after the final norm.
        attention: For each decoder layer index, `[1, R, H * dv]` attention output at the last `R` positions.
    """

    logits: Tensor
    state: Tensor
    attention: dict[int, Tensor]


def capture(model: nn.Module, inputs: Mapping[str, Any], rows: int) -> PrefillOutputs:
    """Captures from one call all outputs by which pruned and unpruned models are compared.

    Args:
        model: A vision-language model, patched or not.
        inputs: Keyword arguments of its call, one prompt without padding.
        rows: Number of last positions whose attention outputs are captured, all of them text.

    Returns:
        PrefillOutputs: Without layers that have no attention function (linear attention, state space).
    """
    layers = list(anatomy.find(model).layers)
    with _decoder_states(model) as seen, attention_probe.attention_outputs(layers, rows) as attention:
        logits = next_token_logits(model, inputs)
    return PrefillOutputs(logits, _at(seen[-1], last_positions(inputs)), attention)


@contextmanager
def _decoder_states(model: nn.Module) -> Iterator[list[Tensor]]:
    """Records the last hidden states `[B, T, D]` of the decoder's calls."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: tuple, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output.last_hidden_state)

    # Registered after the hooks of a patch, so it sees states of the caller's length.
    handle = anatomy.find(model).decoder.register_forward_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


def _at(states: Tensor, positions: Tensor) -> Tensor:
    return states[torch.arange(len(positions)), positions.to(states.device)].float()


def divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """`[B]` Kullback-Leibler divergence of softmax(`logits`) from softmax(`reference`), both `[B, V]`, in nats."""
    p, q = (x.double().log_softmax(-1) for x in (reference, logits))
    return (p.exp() * (p - q)).sum(-1).clamp_min(0)


def cosine(reference: Tensor, states: Tensor) -> Tensor:
    """`[B]` cosine between rows `[B, D]`, in float32 or the wider dtype; 0 instead of NaN."""
    dtype = torch.promote_types(reference.dtype, torch.float32)
    return torch.nn.functional.cosine_similarity(reference.to(dtype), states.to(dtype), dim=-1).nan_to_num(0.0)


def relative_error(reference: Tensor, other: Tensor) -> float:
    """`|other - reference| / |reference|`, Frobenius norms; 0 where both are 0."""
    reference, difference = reference.double(), other.double() - reference.double()
    size = float(reference.norm())
    return float(difference.norm()) / size if size else float(difference.any())
