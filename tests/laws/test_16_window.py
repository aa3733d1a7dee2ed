# SPDX-License-Identifier: Apache-2.0
"""Law 16: with a bounded cache (`window=`), outputs equal those of a model in which the evicted frames are masked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, Image, Video
from reference import Drops, masked
from support import LAYOUTS, model_of, pruned
from transformers import DynamicCache

import vtprune

PICTURES = [[3, Image(3), 2], [2, Image(3), 1, Image(3), 2], [4], [2, Image(3), 3], [1, Image(3), 4]]
CLIPS = [[3, Video(3), 2], [2, Video(3), 2], [4], [1, Video(3), 3]]
VISUAL = {"pixel_values", "pixel_values_videos", "image_grid_thw", "video_grid_thw", "image_sizes", "mm_token_type_ids"}


def chunks(family: str, prompts: list) -> list[dict[str, Any]]:
    """One call per prompt, without vision arguments where a prompt has no picture."""
    batches = [FAMILIES[family].batch([prompt], seed=number) for number, prompt in enumerate(prompts)]
    return [{k: v for k, v in b.items() if k in VISUAL or k == "input_ids"} for b in batches]


def stream(model: torch.nn.Module, calls: list[dict[str, Any]], before: Any = None, after: Any = None) -> list:
    """Logits of successive calls on one cache."""
    cache, out = DynamicCache(), []
    for call in calls:
        with before() if before else torch.no_grad():
            start = cache.get_seq_length()
            positions = torch.arange(call["input_ids"].shape[1])[None] + start
            if "mm_token_type_ids" in call:  # M-RoPE: positions of appended tokens come from the caller
                positions = positions.expand(3, -1, -1)
            out.append(model(**call, position_ids=positions, past_key_values=cache, use_cache=True).logits)
        if after:
            after(cache)
    return out


def check(family: str, method: Any, prompts: list, window: int, ratio: float) -> None:
    model, calls = model_of(family), chunks(family, prompts)
    drops: list[list[Drops]] = [[]]  # after each call, the tokens pruned so far
    left: list[torch.Tensor] = []  # after each call, the columns it evicted

    def look(cache: Any) -> None:
        call = calls[len(left)]
        visual = bool(patch.anatomy.is_placeholder(call["input_ids"]).any())
        drops.append([*drops[-1], spy.drops()] if visual else drops[-1])
        left.append(patch.last.evicted[0] if visual else torch.empty(0, dtype=torch.long))
        assert cache.get_seq_length() == sum(call["input_ids"].shape[1] for call in calls[: len(left)])

    with pruned(model, method, ratio=ratio, window=window) as (patch, spy):
        got = stream(model, calls, after=look)
    drops = drops[1:]
    gone: list[torch.Tensor] = []
    position = iter(range(len(calls)))

    def hidden() -> Any:
        number = next(position)
        gone.extend(left[number - 1 : number] if number else [])
        evicted = [Drops([(0, [columns])]) for columns in gone]
        return masked(vtprune.inspect(model).layers, [*drops[number], *evicted])

    want = stream(model, calls, before=hidden)
    assert sum(map(len, left)) > 0, "nothing was evicted"
    for number, (mine, theirs) in enumerate(zip(got, want, strict=True)):
        start = sum(call["input_ids"].shape[1] for call in calls[:number])
        dropped = torch.zeros(1, start + mine.shape[1], dtype=torch.bool)
        for drop in drops[number]:
            dropped |= drop.mask(10_000, 1, dropped.shape[1])
        alive = ~dropped[:, start:]
        torch.testing.assert_close(mine[alive], theirs[alive], rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


def test_pictures_one_after_the_other(family: str, layout: str) -> None:
    tokens = FAMILIES[family].image(3, torch.Generator()).tokens
    check(family, LAYOUTS[layout], PICTURES, window=2 * tokens, ratio=0.6)


@pytest.mark.parametrize("kind", [name for name, family in FAMILIES.items() if family.video])
@pytest.mark.parametrize("ratio", [1.0, 0.5])
def test_clips_lose_whole_frames(kind: str, ratio: float) -> None:
    check(kind, "vcast", CLIPS, window=6 if ratio == 1.0 else 9, ratio=ratio)


def test_a_bound_for_as_long_as_one_likes() -> None:
    """Each layer's cache holds the text and the newest `window` visual tokens, however long the conversation."""
    model, make = model_of("qwen2_5_vl"), FAMILIES["qwen2_5_vl"]
    call = chunks("qwen2_5_vl", [[1, Video(3), 1]])[0]
    clip, text = make.video(3, torch.Generator()).tokens, call["input_ids"].shape[1]
    text -= clip
    sizes = []
    with pruned(model, "uniform", window=12) as (patch, _):
        stream(model, [call] * 12, after=lambda cache: sizes.append([x.keys.shape[-2] for x in cache.layers]))
        assert [len(patch.last.evicted[0])] == [clip]
    for number, layers in enumerate(sizes):
        assert layers == [(number + 1) * text + 12] * len(layers)


def test_samples_of_a_batch_lose_their_own_frames() -> None:
    """Each row of a batch of unequal lengths evicts its own frames and generates as alone."""
    model, make = model_of("qwen2_5_vl"), FAMILIES["qwen2_5_vl"]
    rows = [[3, Video(3), 4], [3, Video(2), 4]]
    tokens = []
    for prompts in (rows, rows[:1], rows[1:]):
        with pruned(model, "uniform", ratio=1.0, window=8) as (patch, _):
            out = model.generate(**make.batch(prompts, "left"), do_sample=False, max_new_tokens=5)
            tokens += out[:, -5:].tolist()
            assert all(len(v) - len(gone) == 8 for v, gone in zip(patch.last.visual, patch.last.evicted, strict=True))
    assert tokens[:2] == tokens[2:]


@pytest.mark.parametrize("window", [0, -3, 2.5, True, "many"])
def test_windows_that_are_none(window: Any) -> None:
    """A window that is not a positive integer raises `BudgetError`."""
    with pytest.raises(vtprune.BudgetError, match=f"window is {window!r}"):
        vtprune.patch(model_of("llava"), window=window)


def test_a_frame_that_does_not_fit_and_caches_that_cannot_forget() -> None:
    model, batch = model_of("llava"), FAMILIES["llava"].batch([[3, Image(0), 5]])
    with vtprune.patch(model, window=20):
        with pytest.raises(vtprune.BudgetError, match="25 visual tokens, more than window=20"):
            model(**batch, use_cache=True)
        model(**batch, use_cache=False)
    with vtprune.patch(model, window=30), pytest.raises(vtprune.UnsupportedModelError, match="StaticLayer"):
        model.generate(**batch, cache_implementation="static", max_new_tokens=2)
    compact = vtprune.methods.VisionZip(positions="compact")
    with pytest.raises(vtprune.MethodError, match="drops more of them later"):
        vtprune.patch(model, ratio=0.5, method=compact, window=30)
