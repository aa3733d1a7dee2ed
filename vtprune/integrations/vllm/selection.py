# SPDX-License-Identifier: Apache-2.0
"""Fewer features: the model's side, between projector and decoder.

The features of all images or clips of a call are laid out flat and handed to a method as `Tokens`, as in the
transformers path; every run of placeholders is a group with the budget that the processor gave it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...core.method import Method
from ...core.tokens import Tokens
from ...models.visual_tokens import grid_places, run_places
from .settings import ServingError


def prune(
    features: Sequence[Tensor],
    runs: Sequence[Sequence[int]],
    counts: Sequence[Sequence[int]],
    method: Method,
    width: int,
    grids: Sequence[Sequence[int] | None] | None = None,
    extra: dict[str, Any] | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """Selects the tokens of every image or clip that stay, and returns their features.

    Args:
        features: For each image or clip `[N, C]`: in the first `width` channels what the decoder receives, in others
            what goes along (deeper features).
        runs: For each its lengths of runs of placeholders, together N.
        counts: For each how many of each run stay.
        method: Selects the tokens.
        width: Of the decoder.
        grids: For each frames, rows and columns of its tokens, where they are known.
        extra: Further fields of `Tokens`: records of taps, the parts of the model, a reader of keys and values.

    Returns:
        list: For each `[n, C]`, `n` as the processor counted, in their order, and `[n]` which of its tokens they are.
    """
    for item, (feature, lengths) in enumerate(zip(features, runs, strict=True)):
        if sum(lengths) != len(feature):
            raise ServingError(
                f"vtprune: image {item} has {len(feature)} features and {sum(lengths)} placeholders; this model does "
                "not fill placeholders one by one, and cannot be pruned"
            )
    if all(list(kept) == list(lengths) for kept, lengths in zip(counts, runs, strict=True)):
        return [(feature, torch.arange(len(feature), device=feature.device)) for feature in features]
    tokens, rows = lay_out(features, runs, counts, width, grids, extra or {})
    keep, hidden = choose(method, tokens)
    flat = torch.cat(list(features))
    index = rows[_true_rows(keep, int(sum(map(sum, counts))))]
    if hidden is not None:
        flat = flat.clone()
        flat[rows, :width] = hidden.to(flat.dtype)
    sizes = [sum(kept) for kept in counts]
    starts = [sum(map(len, features[:item])) for item in range(len(features))]
    places = [part - start for part, start in zip(index.split(sizes), starts, strict=True)]
    return list(zip(flat[index].split(sizes), places, strict=True))


def with_text(
    feature: Tensor, kept: Tensor, ids: Tensor, visual: Tensor, model: Any, width: int
) -> tuple[Tensor, Tensor]:
    """The rows of an image or a clip with its embedded text, in their order, and which of its positions they have.

    Args:
        feature: `[n, C]` features of the tokens that stay, in order.
        kept: `[n]` which of its tokens they are.
        ids: `[L]` its part of the unpruned prompt, on the CPU.
        visual: `[L]` bool, True for placeholders.
        model: A vLLM model.
        width: Of the decoder.

    Raises:
        ServingError: The decoder's table of embeddings was not loaded.
    """
    rows = visual.nonzero()[:, 0].to(feature.device)[kept]
    if bool(visual.all()):
        return feature, rows
    text = (~visual).nonzero()[:, 0]
    words = model.get_language_model().embed_input_ids(ids[text].to(feature.device))
    if words.is_meta:
        raise ServingError(
            f"vtprune: {type(model).__name__} has text inside a picture or clip, whose embeddings mm_encoder_only "
            "does not load; serve it without mm_encoder_only, or leave vtprune out"
        )
    words = torch.nn.functional.pad(words.to(feature), (0, feature.shape[1] - width))  # deeper features: none
    rows, order = torch.cat([rows, text.to(feature.device)]).sort()
    return torch.cat([feature, words])[order], rows


def choose(method: Method, tokens: Tokens) -> tuple[Tensor, Tensor | None]:
    """`[M]` bool which tokens stay, and the new states `[M, D]` of a method that merges."""
    with torch.no_grad():
        choice = method.choose(tokens)
    return choice.keep.to(tokens.hidden.device), choice.hidden


def _true_rows(keep: Tensor, count: int) -> Tensor:
    """The `count` rows that are True, in order, without asking the device how many they are."""
    return torch.sort(keep.to(torch.uint8), descending=True, stable=True).indices[:count].sort().values


def lay_out(
    features: Sequence[Tensor],
    runs: Sequence[Sequence[int]],
    counts: Sequence[Sequence[int]],
    width: int,
    grids: Sequence[Sequence[int] | None] | None,
    extra: dict[str, Any],
) -> tuple[Tokens, Tensor]:
    """The tokens of all groups that keep some, and which rows of the features, one image after the other, they are.

    A group that keeps nothing takes no part: a method is never asked for none.
    """
    device = features[0].device
    image, places, lengths, budgets, alive = [], [], [], [], []
    for number, (sizes, kept) in enumerate(zip(runs, counts, strict=True)):
        places.append(_places(sizes, None if grids is None else grids[number]))
        for size, budget in zip(sizes, kept, strict=True):
            alive.append(torch.full((size,), budget > 0))
            if budget:
                lengths.append(size)
                budgets.append(budget)
        image.append(torch.full((sum(sizes),), number))
    rows = torch.cat(alive).nonzero()[:, 0]
    numbers = torch.cat(image)[rows]
    index = torch.cat([torch.arange(len(place)) for place in places])[rows]
    frame, crop, row, col = torch.cat(places)[rows].unbind(1)
    every = torch.stack([numbers, frame, crop, row, col, index, rows]).to(device)  # one copy to the device
    numbers, frame, crop, row, col, index, rows = every.unbind(0)
    offsets, wanted, originals = (
        torch.tensor(x).to(device) for x in ([0, *torch.tensor(lengths).cumsum(0).tolist()], budgets, lengths)
    )
    hidden = torch.cat([feature[:, :width] for feature in features])[rows]
    known = {"num_layers": 1, **extra}
    tokens = Tokens(
        hidden=hidden,
        offsets=offsets,
        budgets=wanted,
        originals=originals,
        max_budget=max(budgets),
        max_length=max(lengths),
        sample=numbers,
        image=numbers,
        frame=frame,
        crop=crop,
        grid_row=row,
        grid_col=col,
        index=index,
        feature=rows,
        position=rows,
        layer=0,
        stage=0,
        **known,
    )
    return tokens, rows


def _places(runs: Sequence[int], grid: Sequence[int] | None) -> Tensor:
    """`[N, 4]` frame, crop, row and column of an image's tokens: of its grid, or run by run."""
    if grid is not None and grid[0] * grid[1] * grid[2] == sum(runs):
        return grid_places(*grid)
    parts = [run_places(length, "image", None) for length in runs]
    if len(parts) > 1:  # tiles: each a crop of its own
        for number, part in enumerate(parts):
            part[:, 1] = number + 1
    return torch.cat(parts)
