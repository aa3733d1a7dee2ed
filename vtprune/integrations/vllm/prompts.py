# SPDX-License-Identifier: Apache-2.0
"""Fewer placeholders: the processor's side, before any model runs.

How many tokens an image or a clip keeps follows from how many it would have had, so vLLM plans with the short prompt
from the start: its length, KV blocks and the encoder's budget. The chosen features fill the placeholders that are left.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .settings import ServingError, Settings

# Fields of an item's data, an item being an image or a clip:
RUNS = "vtprune_runs"  # lengths of its runs of placeholders before pruning
COUNTS = "vtprune_counts"  # how many of each run stay
# Its part of the unpruned prompt, with the text between frames or rows; where positions have one axis and there is no
# such text, nothing. Placeholders of rows are `VISUAL`.
IDS = "vtprune_ids"
VISUAL = -1


class Written(list):
    """Target of an update: all placeholders of an image, which the tokenizer has written into the prompt (Pixtral).

    vLLM only looks for these, by an update that matches nothing; pruned ones stand in their place.
    """


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


def rows_of(full: Sequence[int], mask: Tensor) -> Tensor | None:
    """Which positions an image of rows takes: runs of one length with the same single token between them.

    Pixtral and Mistral 3 write a picture so, as one group of tokens; tiles have other text between them.

    Args:
        full: Token ids.
        mask: `[n]` bool, True for placeholders.

    Returns:
        Tensor: `[n]` bool, True from the first placeholder to the last; None for an image of another kind.
    """
    runs, places = runs_of(mask), mask.nonzero()[:, 0].tolist()
    if len(runs) < 2 or len(set(runs)) > 1:
        return None
    inside = torch.zeros_like(mask)
    inside[places[0] : places[-1] + 1] = True
    between = [token for token, text in zip(full, (inside & ~mask).tolist(), strict=True) if text]
    return inside if len(between) == len(runs) - 1 and len(set(between)) == 1 else None


def prune_update(
    update: Any, settings: Settings, token: int | None = None, share: float | None = None
) -> tuple[Any, list[int], list[int]]:
    """Shortens the placeholders of a resolved prompt update.

    Args:
        update: vLLM's update for one image or clip.
        settings: Budget.
        token: Placeholder id, where features fill text between frames as well; None if they fill placeholders, and
            what is between rows.
        share: Its own ratio; None for that of all.

    Returns:
        tuple: The update, the lengths of the runs of placeholders that it had, and those that are left.
    """
    content = update.content
    full = list(content.full)
    filled = torch.ones(len(full), dtype=torch.bool) if content.is_embed is None else content.is_embed(full).bool()
    mask = filled if token is None else torch.tensor(full) == token
    runs = runs_of(mask)
    inside = rows_of(full, mask) if token is None else None
    if inside is not None:  # how many tokens each row keeps is known later; features fill the text between as well
        runs, filled = [sum(runs)], inside
    counts = settings.counts(runs, share)
    stays = shorten(mask, counts) if inside is None else ~mask | (mask.cumsum(0) <= counts[0])
    left = [token for token, stay in zip(full, stays.tolist(), strict=True) if stay]
    embeds = functools.partial(_constant, filled[stays])
    content = dataclasses.replace(content, full=left, is_embed=embeds)
    return dataclasses.replace(update, content=content), runs, counts


def _ids_of_rows(update: Any) -> list[int]:
    """The `IDS` of an image where positions have one axis."""
    full = list(update.content.full)
    filled = update.content.is_embed
    mask = torch.ones(len(full), dtype=torch.bool) if filled is None else filled(full).bool()
    inside = rows_of(full, mask)
    if inside is None:
        return []
    return torch.where(mask, VISUAL, torch.tensor(full))[inside].tolist()


def _constant(mask: Tensor, full: list[int]) -> Tensor:
    return mask


def spread_over_frames(full: Sequence[int], token: int, frames: int) -> list[int]:
    """A clip's part of the unpruned prompt.

    Where clips may be pruned, vLLM writes the placeholders of all frames into the first one and leaves others empty.

    Args:
        full: Ids with all placeholders in one run; text between frames, if there is any, opens each frame by the id
            that stands before the run.
        token: Placeholder id.
        frames: Number of frames.
    """
    text = [t for t in full if t != token]
    if not text:
        return list(full)
    opening = full[full.index(token) - 1]
    if len(runs_of(torch.tensor(full) == token)) != 1 or text.count(opening) != frames:
        raise ServingError("vtprune: the placeholders of a clip are laid out in a way that is not known; serve images")
    each = (len(full) - len(text)) // frames
    return [t for word in text for t in ([word, *[token] * each] if word == opening else [word])]


def _field(numbers: list[int]) -> Any:
    from vllm.multimodal.inputs import MultiModalBatchedField, MultiModalFieldElem

    return MultiModalFieldElem(
        data=torch.tensor(numbers, dtype=torch.long), field=MultiModalBatchedField(keep_on_cpu=True)
    )


@functools.cache
def pruned_processor(cls: Any) -> type:
    """A processor like `cls` whose prompts hold as many placeholders as stay.

    Made by inheritance from `cls` alone, so that an object can take on the class.

    Attributes:
        vtprune: Settings.
        vtprune_tokens: Placeholder id of each modality that is pruned; None where features fill placeholders alone.
    """

    class PrunedProcessor(cls):
        vtprune: Settings
        vtprune_tokens: dict[str, int | None]

        def _get_mm_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any) -> Any:
            updates = dict(super()._get_mm_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs))
            for modality in self.vtprune_tokens:
                if modality in updates:
                    updates[modality] = [
                        _prune_item(self, item, out_mm_kwargs[modality][i], modality, mm_items[modality].get(i))
                        for i, item in enumerate(updates[modality])
                    ]
            return updates

        def _maybe_apply_prompt_updates(self, mm_items: Any, mm_res: Any) -> Any:
            items = [item for m in self.vtprune_tokens for item in mm_res.prompt_updates.get(m, ())]
            if not any(isinstance(update.target, Written) for item in items for update in item):
                return super()._maybe_apply_prompt_updates(mm_items, mm_res)
            from vllm.multimodal.processing import BaseMultiModalProcessor

            return BaseMultiModalProcessor._maybe_apply_prompt_updates(self, mm_items, mm_res)

        def _get_mm_hashes(self, inputs: Any) -> Any:
            # An image pruned in another way is another image to every cache: processor, encoder, prefix, remote ones.
            mark = f"-vtprune-{self.vtprune.fingerprint}"
            return {
                modality: [value + mark for value in values] if modality in self.vtprune_tokens else values
                for modality, values in super()._get_mm_hashes(inputs).items()
            }

    return PrunedProcessor


def _prune_item(processor: Any, updates: Sequence[Any], fields: Any, modality: str, pixels: Any) -> list[Any]:
    """The pruned updates of an image or a clip; what pruning needs later is added to its fields."""
    settings: Settings = processor.vtprune
    settings.check_item(pixels)
    token = processor.vtprune_tokens[modality]
    share = settings.share_of(pixels)
    pruned = [prune_update(_findable(update), settings, token, share) for update in updates]
    _, runs, counts = pruned[0]
    if any(others != runs for _, others, _ in pruned):
        raise ServingError(f"vtprune: {type(processor).__name__} offers placeholders of several lengths for an image")
    fields[RUNS], fields[COUNTS] = _field(runs), _field(counts)
    if token is None:
        fields[IDS] = _field(_ids_of_rows(updates[0]))
    else:
        frames = int(fields["video_grid_thw"].data[0]) if modality == "video" else 1
        fields[IDS] = _field(spread_over_frames(list(updates[0].content.full), token, frames))
    return [update for update, _, _ in pruned]


def _findable(update: Any) -> Any:
    """The update, with a target where it has an empty one."""
    written = isinstance(update.target, list) and not update.target
    return dataclasses.replace(update, target=Written(update.content.full)) if written else update


@functools.cache
def pruned_info(cls: Any) -> type:
    """Processing information like `cls` in which the most tokens of an image are counted, not looked up."""

    class PrunedInfo(cls):
        def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Any) -> None:
            return None

    return PrunedInfo


def prune_processor(processor: Any, settings: Settings, uses_mrope: bool) -> None:
    """Turns a processor that vLLM made into one for pruned models: of images, and with M-RoPE of clips.

    Raises:
        ServingError: The model takes neither.
    """
    config = processor.info.get_hf_config()
    names = {m: getattr(config, f"{m}_token_id", None) for m in ("image", "video")}
    tokens = {m: t for m, t in names.items() if t is not None} if uses_mrope else {"image": None}
    taken = list(processor.info.supported_mm_limits)
    if not set(taken) & set(tokens):
        raise ServingError(
            f"vtprune: {type(processor).__name__} takes {', '.join(taken)}; expected {' or '.join(tokens)}, which the "
            "plug-in prunes; leave 'vtprune' out"
        )
    kind: Any = type(processor)
    info: Any = type(processor.info)
    processor.__class__ = pruned_processor(kind)
    processor.info.__class__ = pruned_info(info)
    processor.vtprune, processor.vtprune_tokens = settings, tokens
