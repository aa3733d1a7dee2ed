# SPDX-License-Identifier: Apache-2.0
"""The method `pixels`: patches that their neighbors do not predict are kept first, in every layout."""

from __future__ import annotations

from typing import Any

import families
import numpy as np
import pytest
import torch
from families import FAMILIES
from PIL import Image
from tower_reference import blocks_of

import vtprune
from vtprune import methods, refvlm, towers
from vtprune.refvlm import pages


def embedded(model: torch.nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    """Decoder inputs `[T, D]` with the blocks of the tower skipped."""
    parts, found = vtprune.inspect(model), []

    def pass_on(module: torch.nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        states = args[0] if args else kwargs["hidden_states"]
        return (states, *output[1:]) if isinstance(output, tuple) else states

    handles = [b.register_forward_hook(pass_on, with_kwargs=True, prepend=True) for b in blocks_of(parts.vision_tower)]
    handles.append(
        parts.decoder.register_forward_pre_hook(lambda m, a, k: found.append(k["inputs_embeds"][0]), with_kwargs=True)
    )
    model(**batch)
    for handle in handles:
        handle.remove()
    return found[0]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["pixel_values", "pixel_values_videos"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_cell_that_differs_counts_as_new_wherever_it_is(family: str, kind: str) -> None:
    if kind == "pixel_values_videos" and FAMILIES[family].video is None:
        pytest.skip("no clips")
    part = families.Image(0) if kind == "pixel_values" else families.Video(0)
    model, batch = FAMILIES[family].build(), FAMILIES[family].batch([[3, part, 5]])
    batch[kind] = torch.full_like(batch[kind], 0.25)
    before = embedded(model, batch)
    pixels = batch[kind] = batch[kind].clone()
    if pixels.dim() >= 4:  # whole pictures: one pixel in the middle of the second tile or frame
        tile = pixels.view(-1, *pixels.shape[-3:])[:2][-1]
        tile[:, tile.shape[1] // 2, tile.shape[2] // 2] = 1.0
    else:  # rows of patches
        pixels[len(pixels) // 2] += torch.linspace(0, 1, pixels[0].numel()).reshape(pixels[0].shape)
    changed = (embedded(model, batch) - before).abs().amax(-1) > 1e-6
    with vtprune.patch(model, keep=2, method="pixels") as patch:
        model(**batch)
        last = patch.last
    score = last.scores[0]
    ours = changed[last.visual[0]]
    assert ours.any() and bool((score[ours] > 0).all()), "changed cells have positive scores"
    # Other positive scores: the first cell of every tile and frame, and cells next to the changed one.
    tiles = len(torch.stack([last.places.frame, last.places.crop], 1).unique(dim=0))
    assert int((score > 0).sum()) <= tiles * 3 + 4 * int(ours.sum())
    assert bool((score[~ours] <= 0).any())


@torch.no_grad()
def test_text_on_an_empty_page_is_never_traded_for_paper() -> None:
    model, processor = refvlm.load(name="qwen2_5_vl")
    page = pages.page(0, (12, 12))
    clean = Image.fromarray(np.where(page.drawn[..., None], np.uint8([0, 0, 0]), np.uint8(255)))  # without its grain
    inputs = processor(images=[clean], text=[refvlm.prompt(page.questions[0].text)], return_tensors="pt")
    with vtprune.patch(model, tower=towers.Pixels()) as patch:
        model(**inputs)
        tower = patch.last.tower
    merge = model.config.vision_config.spatial_merge_size**2
    new = (tower.kept[0][::merge] // merge).unique()  # cells that `towers.Pixels` keeps, in the tower's order
    total = tower.patches[0] // merge
    assert 0.02 < len(new) / total < 0.6, "most of a page is paper"
    with vtprune.patch(model, keep=len(new), method="pixels") as patch:
        model(**inputs)
        kept, paper = patch.last.kept[0], patch.last.scores[0] <= 0
        assert not bool(torch.isin(patch.last.visual[0][paper], kept).any())
    with vtprune.patch(model, keep=len(new) // 2, method="pixels") as patch:
        model(**inputs)
        assert bool(torch.isin(patch.last.kept[0], kept).all())


def test_features_without_pixels_are_refused() -> None:
    model, batch = FAMILIES["qwen2_vl"].build(), FAMILIES["qwen2_vl"].batch([[3, families.Image(0), 5]])
    with torch.no_grad():
        features = model.get_image_features(batch["pixel_values"], batch["image_grid_thw"]).pooler_output
        embeds = model.get_input_embeddings()(batch["input_ids"])
        embeds[batch["input_ids"] == 3] = torch.cat(list(features))
        with (
            vtprune.patch(model, ratio=0.5, method="pixels") as patch,
            patch.visual(batch["input_ids"]),
            pytest.raises(vtprune.MethodError, match="vision tower, which did not run"),
        ):
            model(inputs_embeds=embeds, attention_mask=batch["attention_mask"])


def test_options_are_checked() -> None:
    with pytest.raises(vtprune.MethodError, match="tolerance"):
        methods.Pixels(tolerance=-1.0)
    with pytest.raises(vtprune.MethodError, match="distance"):
        methods.Pixels(distance="largest")  # type: ignore[arg-type]


@torch.no_grad()
def test_cells_are_found_in_towers_with_windows() -> None:
    model, processor = refvlm.load(name="qwen2_5_vl")
    vision = model.config.vision_config
    cell = vision.patch_size * vision.spatial_merge_size
    assert vision.window_size < 13 * cell
    page = np.full((13 * cell, 13 * cell, 3), 255, np.uint8)
    page[6 * cell : 7 * cell, 9 * cell : 10 * cell] = 0
    inputs = processor(images=[Image.fromarray(page)], text=[refvlm.prompt("what?")], return_tensors="pt")
    with vtprune.patch(model, keep=4, method="pixels") as patch:
        model(**inputs)
        kept = (patch.last.kept[0] - patch.last.visual[0][0]).tolist()
    # The first cell, the black one, and those to its right and below it, which it does not predict.
    assert [divmod(k, 13) for k in kept] == [(0, 0), (6, 9), (6, 10), (7, 9)]
