# SPDX-License-Identifier: Apache-2.0
"""One prompt answered with and without pruning, side by side: answers, tokens, time to first token, KV bytes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..models.transformers_names import cache_of

if TYPE_CHECKING:
    import torch

    from ..engine.patching import Patch


@dataclass(frozen=True)
class Side:
    """What one way of answering gave.

    Attributes:
        answer: The decoded answer.
        visual_tokens: Visual tokens that reach the last decoder layer.
        prompt_tokens: All prompt tokens that do.
        seconds: Time to first token, from the model inputs to the first new token (vision tower, selection and prefill
            included): the median of `repeats`.
        selection_time: The part of `seconds` that choosing the tokens takes (median; 0 without pruning).
        kv_bytes: Bytes of all keys and values that the prompt leaves in the cache.
        repeats: Runs that `seconds` is the median of.
    """

    answer: str
    visual_tokens: int
    prompt_tokens: int
    seconds: float
    selection_time: float
    kv_bytes: int
    repeats: int


def measure_side_by_side(
    model: Any, processor: Any, inputs: Mapping[str, Any], patch: Patch, *, max_new_tokens: int = 32, repeats: int = 5
) -> tuple[Side, Side]:
    """Answers one prompt (batch of one) unpruned and pruned.

    The two take turns, so that a machine that grows slower or faster meanwhile treats them alike; each is warmed up by
    answering in full before the clock runs.

    Args:
        model: A patched model.
        processor: Its processor, for decoding.
        inputs: Model inputs of one prompt, on the device of the model.
        patch: What `vtprune.patch` returned for the model.
        max_new_tokens: Length limit of the answers.
        repeats: Timed runs of each.

    Returns:
        tuple[Side, Side]: Without pruning, with pruning.
    """
    ways: tuple[Callable[[], AbstractContextManager], ...] = (patch.paused, nullcontext)
    answers, sizes = [], []
    for way in ways:
        with way():
            out = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
            new = out[0, inputs["input_ids"].shape[1] :]
            answers.append(processor.decode(new, skip_special_tokens=True).strip())
            sizes.append(cache_bytes(cache_of(_first_token(model, inputs))))
    times: tuple[list[float], list[float]] = ([], [])
    selection = []
    for _ in range(repeats):
        for way, spent in zip(ways, times, strict=True):
            with way():
                spent.append(_timed(model, inputs))
        selection.append(patch.last.selection_time if patch.last else 0.0)  # the pruned run was the last one
    last = patch.last
    if last is None:  # the prompt held no visual token
        visual = kept = 0
    else:
        visual, kept = len(last.visual[0]), len(last.kept[0])
    prompt = inputs["input_ids"].shape[1]
    medians = [statistics.median(spent) for spent in times]
    return (
        Side(answers[0], visual, prompt, medians[0], 0.0, sizes[0], repeats),
        Side(answers[1], kept, prompt - visual + kept, medians[1], statistics.median(selection), sizes[1], repeats),
    )


def cache_bytes(cache: Any) -> int:
    """Bytes of the keys and values of all layers of a transformers cache; layers without any count nothing."""
    cache = getattr(cache, "self_attention_cache", cache)
    total = 0
    for layer in cache.layers:
        for part in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            total += 0 if part is None else part.nbytes
    return total


def _first_token(model: Any, inputs: Mapping[str, Any]) -> Any:
    return model.generate(**inputs, max_new_tokens=1, do_sample=False, return_dict_in_generate=True)


def _timed(model: Any, inputs: Mapping[str, Any]) -> float:
    """Seconds until the first token is there."""
    wait(inputs["input_ids"].device)
    start = time.perf_counter()
    _first_token(model, inputs)
    wait(inputs["input_ids"].device)
    return time.perf_counter() - start


def wait(device: torch.device) -> None:
    """Lets an accelerator finish what was queued."""
    import torch

    if device.type != "cpu":
        torch.accelerator.synchronize(device)
