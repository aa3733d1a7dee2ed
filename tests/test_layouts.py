# SPDX-License-Identifier: Apache-2.0
"""Picture layouts (`docs/layouts.md`): which tokens are visual, their grid positions, and which are kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, IMAGE, TEXT, VIDEO, VISION_END, VISION_START, Image, Video
from reference import Drops, masked

import vtprune
from tests.architectures import build

pytestmark = pytest.mark.usefixtures("no_grad")


def prune(model: torch.nn.Module, inputs: dict[str, Any], method: str = "fastv") -> Any:
    """Prunes to a fifth; asserts that only placeholders are dropped and that the answer is that of the masked model.

    Returns:
        VisualTokens: Pictures and grid positions of the visual tokens.
    """
    ids, plain = inputs["input_ids"], model(**inputs).logits[:, -1]
    placeholders = torch.tensor(list(vtprune.inspect(model).placeholders.values()))
    with vtprune.patch(model, ratio=0.2, method=method) as patch:
        out, last = model(**inputs, use_cache=True), patch.last
        got = generate(model, inputs)
        assert [k.tolist() for k in patch.last.kept] == [k.tolist() for k in last.kept]
    for row, (visual, kept) in enumerate(zip(last.visual, last.kept, strict=True)):
        assert visual.tolist() == torch.isin(ids[row], placeholders).nonzero()[:, 0].tolist()
        assert len(kept) == max(1, round(0.2 * len(visual)))
    dropped = len(last.visual[0]) - len(last.kept[0])
    assert out.past_key_values.get_seq_length(3) == ids.shape[1] - dropped  # all text and the kept tokens
    with masked(vtprune.inspect(model).layers, [Drops.of(last)]):
        assert generate(model, inputs) == got
        torch.testing.assert_close(model(**inputs).logits[:, -1], out.logits[:, -1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(out.logits[:, -1], plain, atol=1e-2)
    return last.places


def generate(model: torch.nn.Module, inputs: dict[str, Any]) -> list[list[int]]:
    return model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, inputs["input_ids"].shape[1] :].tolist()


def words(*ids: int) -> list[int]:
    return list(ids)


def prompt_of(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    ids = torch.tensor(rows)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("method", ["random", "fastv", "pooling"])
def test_timestamps_between_the_frames_of_a_clip(method: str) -> None:
    """Qwen3-VL: time stamps before the frames of a clip are not dropped, and all frames belong to one clip."""
    model, generator = FAMILIES["qwen3_vl"].build(), torch.Generator().manual_seed(4)
    row = [1, 20, VISION_START, *[IMAGE] * 12, VISION_END, 21]  # as many tokens as the clip
    for number in range(3):
        row += [*words(60 + number, 70, 71), VISION_START, *[VIDEO] * 4, VISION_END]
    inputs = prompt_of([[*row, 30, 31, 32]])
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).long() + 2 * (inputs["input_ids"] == VIDEO).long()
    inputs["image_grid_thw"], inputs["video_grid_thw"] = torch.tensor([[1, 4, 12]]), torch.tensor([[3, 4, 4]])
    for name in ("pixel_values", "pixel_values_videos"):
        inputs[name] = torch.randn(48, 96, generator=generator)
    if method == "pooling":  # merged tokens have no masked reference: only the kept columns are checked
        with vtprune.patch(model, ratio=0.2, method=method) as patch:
            model(**inputs)
            places, kept = patch.last.places, patch.last.kept[0]
        assert set(inputs["input_ids"][0, kept].tolist()) <= {IMAGE, VIDEO}
    else:
        places = prune(model, inputs, method)
    assert places.image.tolist() == [0] * 12 + [1] * 12
    assert places.frame.tolist() == [0] * 12 + [0] * 4 + [1] * 4 + [2] * 4
    assert places.grid_row.tolist() == [0] * 6 + [1] * 6 + [0, 0, 1, 1] * 3
    assert places.grid_col[12:].tolist() == [0, 1, 0, 1] * 3


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_newlines_of_any_resolution_tiles(family: str) -> None:
    """After the thumbnail, a newline behind each row of the tile grid is a visual token without a grid position."""
    model, inputs = FAMILIES[family].build(), FAMILIES[family].batch([[3, Image(0), 5]])
    places = prune(model, inputs)
    tile = places.crop == 1
    rows, ends = places.grid_row[tile], (places.grid_row == -1) & tile
    assert (places.crop == 0).sum() == 16 and not ends[places.crop == 0].any()
    assert int(ends.sum()) == int(rows.max()) + 1  # one newline behind each row
    widths = [int((rows == r).sum()) for r in range(int(rows.max()) + 1)]
    assert len(set(widths)) == 1 and ends.nonzero()[:, 0].diff().unique().tolist() == [widths[0] + 1]
    assert torch.equal(places.grid_col == -1, places.grid_row == -1)


def test_newline_behind_a_clip() -> None:
    """LLaVA-OneVision: the frames of a clip are one run with a single newline at its end."""
    model, inputs = FAMILIES["llava_onevision"].build(), FAMILIES["llava_onevision"].batch([[3, Video(0), 5]])
    places = prune(model, inputs)
    assert places.frame[:-1].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert places.grid_row.tolist() == [0, 0, 1, 1] * 3 + [-1]


def test_clips_side_by_side_are_clips_of_their_own() -> None:
    family = FAMILIES["llava_onevision"]
    model, batch = family.build(), family.batch([[3, Video(0), Video(1), 5]])
    with torch.no_grad(), vtprune.patch(model, ratio=0.5, method="evs") as patch:
        model(**batch)
    places = patch.last.places
    assert torch.bincount(places.image).tolist() == [13, 13]
    assert places.frame.tolist() == [*[0] * 4, *[1] * 4, *[2] * 4, -1] * 2


def test_tags_between_tiles() -> None:
    """Idefics 3, SmolVLM: the tags with row and column around each tile, and line ends, are text."""
    model, generator = FAMILIES["smolvlm"].build(), torch.Generator().manual_seed(2)
    row = [1, 20, 21]
    for line in range(2):
        for tile in range(2):
            row += [VISION_START, 40 + 2 * line + tile, *[IMAGE] * 16]
        row.append(50)  # the end of a line of tiles
    inputs = prompt_of([[*row, VISION_START, 45, *[IMAGE] * 16, VISION_START, 30, 31]])
    inputs["pixel_values"] = torch.randn(1, 5, 3, 32, 32, generator=generator)
    places = prune(model, inputs)
    assert places.image.tolist() == [i for i in range(5) for _ in range(16)]
    assert places.grid_row.tolist() == [r for r in range(4) for _ in range(4)] * 5


def test_tiles_in_one_run() -> None:
    """InternVL: the tiles of a picture are one run between two tags, with the thumbnail last."""
    model, inputs = FAMILIES["internvl"].build(), FAMILIES["internvl"].batch([[3, Image(2), 5]])
    places = prune(model, inputs)
    assert places.image.unique().tolist() == [0]
    assert places.crop.tolist() == [c for c in range(3) for _ in range(16)]
    assert places.grid_row.tolist() == [r for r in range(4) for _ in range(4)] * 3


def mistral3() -> torch.nn.Module:
    from transformers import AutoModelForImageTextToText, Mistral3Config

    vision = {"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 2, "head_dim": 8, "image_size": 64, "patch_size": 4}
    config = Mistral3Config(
        vision_config=vision,
        text_config={"model_type": "mistral", "head_dim": 8, **TEXT},
        image_token_id=IMAGE,
        spatial_merge_size=2,
    )
    torch.manual_seed(0)
    return build.widen(AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa").eval())


def test_row_tokens() -> None:
    """Mistral 3: runs separated by row-end tokens are rows of one picture, also for a picture of a single row."""
    model, side = mistral3(), 8
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    row_end, image_end = 50, 51
    shapes, row = [(3, 4), (2, 2), (1, 5)], [1, 20, 21]
    for lines, width in shapes:
        for line in range(lines):
            row += [*[IMAGE] * width, image_end if line == lines - 1 else row_end]
    inputs = prompt_of([[*row, 30, 31, 32]])
    sizes = torch.tensor([[h * side, w * side] for h, w in shapes])
    inputs["image_sizes"] = sizes
    pixels = torch.zeros(3, 3, *sizes.amax(0).tolist())
    for number, (h, w) in enumerate(sizes.tolist()):
        pixels[number, :, :h, :w] = torch.randn(3, h, w, generator=torch.Generator().manual_seed(number))
    inputs["pixel_values"] = pixels
    places = prune(model, inputs)
    assert places.image.tolist() == [0] * 12 + [1] * 4 + [2] * 5
    wanted = [(r, c) for lines, width in shapes for r in range(lines) for c in range(width)]
    assert list(zip(places.grid_row.tolist(), places.grid_col.tolist(), strict=True))[:16] == wanted[:16]


def test_two_pictures_with_a_word_between_them_are_two() -> None:
    """Two runs separated by one word are two pictures if the encoder returns two."""
    model, inputs = FAMILIES["llava"].build(), FAMILIES["llava"].batch([[3, Image(0), 1, Image(0), 5]])
    places = prune(model, inputs)
    assert places.image.tolist() == [0] * 25 + [1] * 25
    assert places.grid_row.tolist() == [r for r in range(5) for _ in range(5)] * 2


@pytest.mark.parametrize("given_as", ["argument", "config"])
def test_a_class_token_that_is_kept_has_no_place(given_as: str) -> None:
    """`vision_feature_select_strategy="full"`: the class token has no grid position; the others are a grid."""
    family = FAMILIES["llava"]
    model, batch = family.build(), family.batch([[3, Image(0), 5]])
    ids = torch.cat([batch["input_ids"][:, :4], torch.full((1, 26), IMAGE), batch["input_ids"][:, -5:]], 1)
    asked = {"vision_feature_select_strategy": "full"}
    if given_as == "config":
        model.config.vision_feature_select_strategy = asked.pop("vision_feature_select_strategy")
    with vtprune.patch(model, ratio=0.3, method="uniform") as patch:
        model(input_ids=ids, pixel_values=batch["pixel_values"], **asked)
        places = patch.last.places
        patch.last.show()
    where = torch.stack([places.grid_row, places.grid_col], 1).tolist()
    assert where[0] == [-1, -1]
    assert where[1:] == [[row, col] for row in range(5) for col in range(5)]
