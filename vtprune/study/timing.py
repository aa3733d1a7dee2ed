# SPDX-License-Identifier: Apache-2.0
"""Measurement of one prompt with and without pruning: answers, tokens, time to first token, KV bytes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..errors import InputError, VTPruneError, one_line
from . import stopwatch
from .given import refuse_below_one

if TYPE_CHECKING:
    from ..engine.patching import Patch


@dataclass(frozen=True)
class Side:
    """Answer of the pruned or the unpruned model, and its cost.

    Attributes:
        answer: The decoded answer.
        visual_tokens: Visual tokens that reach the last decoder layer.
        prompt_tokens: All prompt tokens that reach it.
        seconds: Time to first token, from the model inputs to the first new token (vision tower, selection and prefill
            included): the median of `repeats`.
        vision: The part of `seconds` in the vision tower and the projector (median).
        selection_time: The part of `seconds` that selecting tokens takes (median; 0 without pruning).
        kv_bytes: Bytes of all keys and values in the cache after the prefill.
        repeats: Number of timed runs.
    """

    answer: str
    visual_tokens: int
    prompt_tokens: int
    seconds: float
    vision: float
    selection_time: float
    kv_bytes: int
    repeats: int

    @property
    def decoder(self) -> float:
        """The part of `seconds` in the decoder."""
        return self.seconds - self.vision - self.selection_time

    @property
    def bound(self) -> float | None:
        """How many times as fast the first token can be at most by pruning the decoder alone; None without a tower."""
        return self.seconds / self.vision if self.vision else None


def _generate(model: Any, inputs: Mapping[str, Any], new_tokens: int, *, pruned: bool) -> Any:
    """Greedy answer; raises `InputError` if the model fails unpruned, so that its files are at fault."""
    try:
        return model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    except (VTPruneError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if pruned:
            raise
        raise InputError(f"the model fails without pruning, too: {type(error).__name__}: {one_line(error)}") from error


def measure_side_by_side(
    model: Any, processor: Any, inputs: Mapping[str, Any], patch: Patch, *, max_new_tokens: int = 32, repeats: int = 5
) -> tuple[Side, Side]:
    """Answers one prompt (batch of one) unpruned and pruned, and times both.

    The two alternate, so that changes of the machine's speed affect both alike; each is warmed up by a full answer.

    Args:
        model: A patched model.
        processor: Its processor, for decoding.
        inputs: Model inputs of one prompt, on the device of the model.
        patch: The patch of the model.
        max_new_tokens: Length limit of the answers.
        repeats: Timed runs of each.

    Returns:
        tuple[Side, Side]: Without pruning, with pruning.

    Raises:
        InputError: The model fails without pruning.
        VTPruneError: A count is below 1.
    """
    refuse_below_one(max_new_tokens=max_new_tokens, repeats=repeats)
    contexts: tuple[Callable[[], AbstractContextManager], ...] = (patch.paused, nullcontext)
    answers = []
    for context in contexts:
        with context():
            out = _generate(model, inputs, max_new_tokens, pruned=context is nullcontext)
            new = out[0, inputs["input_ids"].shape[1] :]
            answers.append(processor.decode(new, skip_special_tokens=True).strip())
    runs: tuple[list[stopwatch.Run], list[stopwatch.Run]] = ([], [])
    selection = []
    for _ in range(repeats):
        for context, done in zip(contexts, runs, strict=True):
            with context():
                done.append(stopwatch.generate(patch.anatomy, inputs, 1))
        selection.append(patch.last.selection_time if patch.last else 0.0)  # the pruned run was the last one
    last = patch.last
    visual, kept = (len(last.visual[0]), len(last.kept[0])) if last else (0, 0)  # no record without visual tokens
    prompt = inputs["input_ids"].shape[1]
    sizes = ((visual, prompt, 0.0), (kept, prompt - visual + kept, statistics.median(selection)))
    before, after = (
        Side(
            answer,
            tokens,
            length,
            statistics.median(run.total for run in done),
            statistics.median(run.vision for run in done),
            selecting,
            done[0].kv_bytes,
            repeats,
        )
        for answer, done, (tokens, length, selecting) in zip(answers, runs, sizes, strict=True)
    )
    return before, after
