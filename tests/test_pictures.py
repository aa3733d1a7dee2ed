# SPDX-License-Identifier: Apache-2.0
"""Boxes of tokens on the original picture, for every family and preprocessing.

Independent of grids and tiles: a spot of the original is changed, the family's own image processor and vision tower
encode it again, and the feature that changes most must belong to a token whose box covers the spot. Attention in the
tower is switched off, so that features depend only on their own pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import families
import numpy as np
import pytest
import torch
from families import _PINPOINTS, FAMILIES, IMAGE, VIDEO, VISION_END, VISION_START
from PIL import Image

import vtprune

WIDE, TALL, LONG = (190, 120), (96, 160), (330, 100)
CASES: dict[str, tuple[str, str, list[tuple[int, int]]]] = {
    "llava-crop": ("llava", "clip", [WIDE, TALL]),
    "llava-stretch": ("llava", "stretched", [WIDE]),
    "llava-pad": ("llava", "padded", [TALL, WIDE]),
    "llava_next": ("llava_next", "next", [WIDE, TALL]),
    "llava_next-long": ("llava_next", "next", [LONG]),
    "llava_onevision": ("llava_onevision", "onevision", [TALL]),
    "llava_onevision-several": ("llava_onevision", "onevision-several", [WIDE, TALL]),
    "qwen2_vl": ("qwen2_vl", "qwen", [WIDE, TALL]),
    "qwen2_5_vl": ("qwen2_5_vl", "qwen", [WIDE]),
    "qwen3_vl": ("qwen3_vl", "qwen", [TALL, WIDE]),
    "internvl": ("internvl", "tiles", [WIDE, TALL]),
    "internvl-long": ("internvl", "tiles", [LONG]),
    "smolvlm": ("smolvlm", "split", [WIDE]),
    "smolvlm-several": ("smolvlm", "split", [LONG, TALL]),
}


@dataclass
class Prepared:
    """Model inputs of a prompt, and the arguments of the encoder that makes its features."""

    inputs: dict[str, torch.Tensor]
    kind: str = "image"
    extra: dict[str, Any] = field(default_factory=dict)


@lru_cache
def _model(family: str) -> torch.nn.Module:
    model = FAMILIES[family].build()
    with torch.no_grad():
        for name, parameter in vtprune.inspect(model).vision_tower.named_parameters():
            if "attn" in name and any(part in name for part in ("out_proj", "o_proj", "attn.proj", "projection_layer")):
                parameter.zero_()
            if "attention.projection_layer" in name:
                parameter.zero_()
    return model


@lru_cache
def _processor(name: str) -> Any:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    def square(n: int) -> dict[str, int]:
        return {"height": n, "width": n}

    def pinpoints(n: int) -> dict[str, Any]:
        return {"size": square(n), "image_grid_pinpoints": _PINPOINTS}

    makers = {
        "clip": lambda: CLIPImageProcessorPil(size={"shortest_edge": 20}, crop_size=square(20)),
        "stretched": lambda: CLIPImageProcessorPil(size=square(20), do_center_crop=False),
        "padded": lambda: LlavaImageProcessorPil(do_pad=True, size={"shortest_edge": 20}, crop_size=square(20)),
        "next": lambda: LlavaNextImageProcessorPil(crop_size=square(16), **pinpoints(16)),
        "onevision": lambda: LlavaOnevisionImageProcessorPil(**pinpoints(16)),
        "qwen": lambda: Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, min_pixels=256, max_pixels=4096),
        "tiles": lambda: GotOcr2ImageProcessorPil(size=square(32), crop_to_patches=True, max_patches=6),
        "split": lambda: SmolVLMImageProcessorPil(size={"longest_edge": 96}, max_image_size={"longest_edge": 32}),
    }
    return makers[name.removesuffix("-several")]()


def picture(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """Blurred random colors."""
    noise = np.random.default_rng(seed).integers(40, 216, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def pixels(case: str, pictures: list[Image.Image]) -> dict[str, Any]:
    """Output of the family's image processor."""
    processor = _processor(case)
    given: Any = [pictures] if case in ("split", "onevision-several") else pictures
    return {k: torch.as_tensor(np.asarray(v)) for k, v in processor(given, return_tensors="pt").items()}


def features(model: torch.nn.Module, data: dict[str, Any], kind: str = "image") -> torch.Tensor:
    """Features `[R, D]` that replace the placeholders."""
    composite = vtprune.inspect(model).composite
    encode = getattr(composite, f"get_{kind}_features")
    with torch.no_grad():
        output = encode(**data).pooler_output
    rows = [output] if isinstance(output, torch.Tensor) else list(output)
    return torch.cat([row.reshape(-1, row.shape[-1]) for row in rows])


def prompt(family: str, case: str, data: dict[str, Any], count: int, kind: str = "image") -> dict[str, torch.Tensor]:
    """A prompt with `count` placeholders, split into runs as by the family's processor."""
    token = VIDEO if kind == "video" else IMAGE
    if case == "split":  # every tile between tags
        runs = [16] * (count // 16)
    elif case == "tiles":
        runs = [16 * int(n) for n in data["num_patches"]] if "num_patches" in data else [count]
    elif f"{kind}_grid_thw" in data:
        runs = [int(g.prod()) // 4 for g in data[f"{kind}_grid_thw"]]
    elif case in ("clip", "padded", "stretched"):
        runs = [25] * (count // 25)
    else:
        runs = [count]
    row = [1, 20]
    for run in runs:
        row += [VISION_START, *[token] * run, VISION_END]
    ids = torch.tensor([[*row, 30, 31, 32]])
    out = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if FAMILIES[family].needs_types:
        out["mm_token_type_ids"] = (ids == IMAGE).long() + 2 * (ids == VIDEO).long()
    return out


def encoder_inputs(case: str, data: dict[str, Any]) -> dict[str, Any]:
    left_out = {"num_patches", "rows", "cols", "pixel_attention_mask"}
    return {k: v for k, v in data.items() if k not in left_out}


def changed(before: torch.Tensor, after: torch.Tensor) -> np.ndarray:
    return (after - before).norm(dim=-1).numpy()


def spoiled(image: Image.Image, box: np.ndarray) -> Image.Image:
    """The picture with the middle third of a rectangle inverted."""
    array = np.array(image)
    x, y = (box[0] + box[2]) / 2 * image.width, (box[1] + box[3]) / 2 * image.height
    half_x, half_y = (box[2] - box[0]) * image.width / 6, (box[3] - box[1]) * image.height / 6
    rows = slice(max(round(y - half_y), 0), max(round(y + half_y), 1))
    cols = slice(max(round(x - half_x), 0), max(round(x + half_x), 1))
    array[rows, cols] = 255 - array[rows, cols]
    return Image.fromarray(array)


def under(view: Any, box: np.ndarray) -> list[int]:
    """Tokens of a view whose boxes overlap the middle third of a rectangle."""
    x, y, half_x, half_y = *(box[:2] + box[2:]) / 2, *(box[2:] - box[:2]) / 6
    left, top, right, bottom = view.boxes.T
    return view.tokens[(left < x + half_x) & (x - half_x < right) & (top < y + half_y) & (y - half_y < bottom)].tolist()


@pytest.mark.parametrize("case", CASES)
def test_the_token_said_to_lie_on_a_spot_is_the_one_that_the_spot_changes(case):
    family, processing, sizes = CASES[case]
    model, originals = _model(family), [picture(size, seed) for seed, size in enumerate(sizes)]
    data = encoder_inputs(processing, pixels(processing, originals))
    before = features(model, data)
    full = pixels(processing, originals)
    with vtprune.patch(model, ratio=0.5, method="uniform") as patch, torch.no_grad():
        model(**prompt(family, processing, full, len(before)), **data)
        views = patch.last.show(originals).views
        feature = patch.last.places.feature.numpy()
    assert [v.picture.size for v in views] == sorted((v.picture.size for v in views), key=sizes.index)
    assert {v.picture.size for v in views} == set(sizes)
    rng = np.random.default_rng(0)
    for number, size in enumerate(sizes):
        mine = [v for v in views if v.picture.size == size]
        finest = max(mine, key=lambda v: len(v.tokens))
        inside = np.flatnonzero((finest.boxes[:, :2] >= -0.01).all(1) & (finest.boxes[:, 2:] <= 1.01).all(1))
        for cell in [inside[0], inside[-1], *rng.choice(inside, 2)]:  # errors of boxes are largest at the corners
            box = finest.boxes[cell]
            other = list(originals)
            other[number] = spoiled(originals[number], box)
            change = changed(before, features(model, encoder_inputs(processing, pixels(processing, other))))[feature]
            assert change[finest.tokens].max() > 1e-3
            for view in mine:
                expected = under(view, box)
                assert (expected == [finest.tokens[cell]]) == (view is finest)  # coarser views may split the spot
                assert view.tokens[change[view.tokens].argmax()] in expected
            others = np.concatenate([v.tokens for v in views if v.picture.size != size] or [np.array([], int)])
            assert not change[others].any()


@pytest.mark.parametrize("padding", ["left", "right"])
def test_pictures_of_a_padded_batch_keep_apart(padding):
    """Prompts with different numbers of tiles, and one without a picture, show only their own tokens."""
    model, originals = _model("smolvlm"), [picture(LONG, 0), picture(TALL, 1)]
    data = {k: torch.as_tensor(np.asarray(v)) for k, v in _processor("split")([[p] for p in originals]).items()}
    values = data["pixel_values"]
    tiles = [int(image.flatten(1).any(1).sum()) for image in values]
    assert tiles[0] != tiles[1] and values.shape[1] == max(tiles)
    alone = [prompt("smolvlm", "split", {}, 16 * n)["input_ids"][0].tolist() for n in tiles]
    rows = [alone[0], [1, 20, 21], alone[1]]
    long = max(map(len, rows))
    gap = [[0] * (long - len(row)) for row in rows]
    ids = torch.tensor([g + r if padding == "left" else r + g for g, r in zip(gap, rows, strict=True)])
    pixel_values = torch.stack([values[0], torch.zeros_like(values[0]), values[1]])
    with vtprune.patch(model, ratio=0.25, method="uniform") as patch, torch.no_grad():
        model(input_ids=ids, attention_mask=(ids != 0).long(), pixel_values=pixel_values)
        shown = patch.last.show(originals, names=["long", "tall"])
        places = patch.last.places
    assert [caption.split(":")[0] for _, caption in shown.panels()] == [
        "long, whole", "long, tiles", "tall, whole", "tall, tiles"
    ]  # fmt: skip
    for view in shown.views:
        assert set(places.sample[view.tokens].tolist()) == {0 if view.picture.size == LONG else 2}
    assert sorted(np.concatenate([v.tokens for v in shown.views])) == list(range(16 * sum(tiles)))
    kept = sum(int(caption.split(": ")[1].split()[0]) for _, caption in shown.panels())
    assert kept == patch.last.tokens[1] == 4 * sum(tiles)


def _clip(family: str, frames: list[Image.Image]) -> dict[str, torch.Tensor]:
    """A clip as the family's video processor prepares it: resized frames, for Qwen two per step."""
    if family == "llava_onevision":
        return {"pixel_values_videos": pixels("onevision-several", frames)["pixel_values"][:, 0][None]}
    made = _processor("qwen")([f.resize((48, 32)) for f in frames], return_tensors="pt")
    rows = torch.as_tensor(np.asarray(made["pixel_values"])).view(len(frames), -1, 3, 2, 16)  # [F, P, C, 2, p * p]
    rows = torch.stack([rows[0::2, :, :, 0], rows[1::2, :, :, 1]], 3)
    return {
        "pixel_values_videos": rows.reshape(-1, 3 * 2 * 16),
        "video_grid_thw": torch.tensor([[len(frames) // 2, *made["image_grid_thw"][0].tolist()[1:]]]),
    }


@pytest.mark.parametrize(("family", "steps"), [("llava_onevision", 4), ("qwen2_vl", 2), ("qwen2_5_vl", 2)])
def test_every_frame_of_a_clip_has_its_own_tokens(family, steps):
    model, frames = _model(family), [picture((128, 128), seed) for seed in range(4)]
    data = _clip(family, frames)
    before = features(model, data, "video")
    with vtprune.patch(model, ratio=0.5, method="uniform") as patch, torch.no_grad():
        model(**prompt(family, "", data, len(before), "video"), **data)
        shown = patch.last.show(videos=[frames])
        feature = patch.last.places.feature.numpy()
        with pytest.raises(vtprune.VTPruneError, match="0 image inputs and 1 were given"):
            patch.last.show(frames[0])
        with pytest.raises(vtprune.VTPruneError, match=f"clip 0 has {steps - 1} frames, .* tokens of {steps}"):
            patch.last.show(videos=[frames[: steps - 1]])
    assert [view.name for view in shown.views] == [f"frame {step}" for step in range(steps)]
    assert len(shown.panels()) == steps and shown.image.width > shown.image.height  # a strip
    for step, view in enumerate(shown.views):
        cell = 5 * step % len(view.tokens)
        other = list(frames)
        for number in range(step * 4 // steps, (step + 1) * 4 // steps):
            other[number] = spoiled(frames[number], view.boxes[cell])
        change = changed(before, features(model, _clip(family, other), "video"))
        mine = feature[view.tokens]
        assert mine[change[mine].argmax()] == mine[cell]
        assert not np.delete(change, mine).any()


def test_a_clip_has_a_strip_of_where_its_budget_went() -> None:
    """A strip has a bar for every frame, as high as the share of its tokens that were kept; pictures have no strip."""
    from vtprune.report import draw

    family = FAMILIES["qwen2_5_vl"]
    model = family.build()
    with vtprune.patch(model, ratio=0.5, method="evs") as patch, torch.no_grad():
        model(**family.batch([[3, families.Video(2), 5]]))
        shown = patch.last.show()
        ((strip, caption),) = shown.strips()
        places = patch.last.places
        counts = torch.bincount(places.frame[patch.last.kept_flat[-1]], minlength=8).tolist()
    assert counts[0] == 8 and sum(counts) == 32 and min(counts) < max(counts)
    assert caption == f"32 of 64 kept in 8 frames, {min(counts)} to 8 a frame, most in frame 0"
    pixels, (filled, _) = np.asarray(strip), (draw._FILLED, draw._EMPTY)
    for frame, count in enumerate(counts):
        column = pixels[: draw._BARS, (2 * frame + 1) * strip.width // 16]
        assert (column == filled).all(-1).sum() == round(draw._BARS * count / 8)
    assert shown.image.height > draw.sheet(shown._rows()).height
    with vtprune.patch(model, ratio=0.5, method="uniform") as patch, torch.no_grad():
        model(**family.batch([[3, families.Image(0), 5]]))
        assert patch.last.show().strips() == []


def test_a_strip_of_more_frames_than_pixels() -> None:
    from vtprune.report import draw

    frame = Image.new("RGB", (64, 36), "red")
    for count in (2, 300, 3000):
        strip = draw.strip([frame] * count, [1] * count, [2] * count)
        bars = np.asarray(strip)[: draw._BARS]
        assert (bars[draw._BARS // 2 :] == draw._FILLED).all(-1).mean() > 0.7
        assert not (bars[: draw._BARS // 2] == draw._FILLED).all(-1).any()
        assert (np.asarray(strip)[draw._BARS :] == (255, 0, 0)).all(-1).mean() > 0.2
