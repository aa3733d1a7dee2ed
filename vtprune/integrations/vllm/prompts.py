# SPDX-License-Identifier: Apache-2.0
"""Fewer placeholders: the processor's side, before any model runs.

How many tokens an image keeps follows from how many it would have had, so vLLM plans with the short prompt from the
start: its length, KV blocks and the encoder's budget. The chosen features fill the placeholders that are left.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .settings import ServingError, Settings

RUNS = "vtprune_runs"  # field of an image's data: lengths of its runs of placeholders before pruning


def runs_of(mask: Tensor) -> list[int]:
    """Lengths of the unbroken runs of True in `[n]` bool."""
    edges = torch.nn.functional.pad(mask.int(), (1, 1)).diff()
    starts, ends = (edges == 1).nonzero()[:, 0], (edges == -1).nonzero()[:, 0]
    return (ends - starts).tolist()


def shorten(mask: Tensor, counts: Sequence[int]) -> Tensor:
    """Which positions stay: all that are no placeholders, and the first `counts[r]` of each run of placeholders.

    Args:
        mask: `[n]` bool, True for placeholders.
        counts: For each run.

    Returns:
        Tensor: `[n]` bool.
    """
    first = mask & ~torch.nn.functional.pad(mask, (1, 0))[:-1]
    run = first.long().cumsum(0) - 1
    place = torch.arange(len(mask))
    start = torch.where(first, place, 0).cummax(0).values
    allowed = torch.tensor([*counts, 0])[run]  # run -1, before the first one, reads the last entry
    return ~mask | (place - start < allowed)


def prune_update(update: Any, settings: Settings) -> tuple[Any, list[int]]:
    """A resolved update of the prompt with its placeholders shortened, and the lengths of the runs that it had."""
    content = update.content
    full = list(content.full)
    mask = torch.ones(len(full), dtype=torch.bool) if content.is_embed is None else content.is_embed(full).bool()
    runs = runs_of(mask)
    stays = shorten(mask, settings.counts(runs))
    left = [token for token, stay in zip(full, stays.tolist(), strict=True) if stay]
    embeds = functools.partial(_constant, mask[stays])
    return dataclasses.replace(update, content=dataclasses.replace(content, full=left, is_embed=embeds)), runs


def _constant(mask: Tensor, full: list[int]) -> Tensor:
    return mask


def _field(runs: list[int]) -> Any:
    from vllm.multimodal.inputs import MultiModalBatchedField, MultiModalFieldElem

    return MultiModalFieldElem(data=torch.tensor(runs), field=MultiModalBatchedField(keep_on_cpu=True))


@functools.cache
def pruned_processor(cls: Any) -> type:
    """A processor like `cls` whose prompts hold as many placeholders as stay; `vtprune` holds its settings.

    Made by inheritance from `cls` alone, so that an object can take on the class.
    """

    class PrunedProcessor(cls):
        vtprune: Settings

        def _get_mm_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any) -> Any:
            updates = super()._get_mm_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)
            if "image" not in updates:
                return updates
            short = []
            for number, item in enumerate(updates["image"]):
                pruned = [prune_update(update, self.vtprune) for update in item]
                if len({tuple(runs) for _, runs in pruned}) != 1:
                    raise ServingError(f"vtprune: {cls.__name__} offers placeholders of several lengths for an image")
                out_mm_kwargs["image"][number][RUNS] = _field(pruned[0][1])
                short.append([update for update, _ in pruned])
            return {**updates, "image": short}

        def _get_mm_hashes(self, inputs: Any) -> Any:
            # An image pruned in another way is another image to every cache: processor, encoder, prefix, remote ones.
            hashes, mark = super()._get_mm_hashes(inputs), f"-vtprune-{self.vtprune.fingerprint}"
            return {k: [v + mark for v in values] if k == "image" else values for k, values in hashes.items()}

    return PrunedProcessor


@functools.cache
def pruned_info(cls: Any) -> type:
    """Processing information like `cls` in which the most tokens of an image are counted, not looked up."""

    class PrunedInfo(cls):
        def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Any) -> None:
            return None

    return PrunedInfo


def prune_processor(processor: Any, settings: Settings) -> None:
    """Turns a processor that vLLM made into one for pruned models."""
    kind: Any = type(processor)
    info: Any = type(processor.info)
    processor.__class__ = pruned_processor(kind)
    processor.info.__class__ = pruned_info(info)
    processor.vtprune = settings
