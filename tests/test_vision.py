# SPDX-License-Identifier: Apache-2.0
"""The mapping from vision patches to prompt tokens, compared with the models."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from families import FAMILIES, IMAGE, Image, Video

import vtprune
from vtprune.core.ragged import top_k
from vtprune.methods import Choice, Method, Stage, Tokens
from vtprune.vision.attention import LAYER, Attention, layer_number, stratified, vision_layers
from vtprune.vision.tower import Vision, layer_tap, over_patches, patches_of_rows, projector_tap

PROMPTS = [[3, Image(0), 5], [2, Image(1), 4, Image(2), 7], [9]]


@dataclass
class Reader(Method):
    """Records the inputs that it gets from the vision tower."""

    seen: list = field(default_factory=list)
    attention: list = field(default_factory=list)
    importance: torch.Tensor | None = None

    def schedule(self, num_layers: int) -> tuple[Stage, ...]:
        return (Stage(0),)

    def taps(self, anatomy: Any) -> tuple:
        return projector_tap(anatomy, "reader"), layer_tap(anatomy, "feature", keep_output=True)

    def choose(self, tokens: Tokens) -> Choice:
        vision = Vision(tokens, "reader")
        self.attention, self.importance = vision.attention(), vision.importance()  # only a patched model can be probed
        self.seen.append((tokens, vision))
        return Choice(top_k(tokens.hidden.norm(dim=-1), tokens.offsets, tokens.budgets))


@torch.no_grad()
def prefill(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> Reader:
    reader = Reader()
    with vtprune.patch(model, ratio=0.5, method=reader):
        model(**batch)
    return reader


def read(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> tuple[Tokens, Vision]:
    return prefill(model, batch).seen[-1]


def cases() -> list:
    kinds = [pytest.param(name, PROMPTS, id=name) for name in FAMILIES]
    clips = [[3, Video(0), 5], [4, Image(1), 2, Video(1), 3]]
    return kinds + [pytest.param(n, clips, id=f"{n}-clips") for n, f in FAMILIES.items() if f.video is not None]


@pytest.mark.parametrize(("family", "prompts"), cases())
def test_rows_of_the_projector_are_found_in_the_prompt(family: str, prompts: list) -> None:
    tokens, vision = read(FAMILIES[family].build(), FAMILIES[family].batch(prompts))
    rows = torch.cat([y.flatten(0, 1) for _, y, _ in vision.calls])
    shown = vision.to_tokens(rows)
    placed = tokens.grid_row >= 0
    assert placed.any()
    torch.testing.assert_close(shown[placed], tokens.hidden[placed])
    assert shown[~placed].isnan().all()


@pytest.mark.parametrize(("family", "prompts"), cases())
def test_features_before_the_projector_give_its_rows(family: str, prompts: list) -> None:
    _, vision = read(FAMILIES[family].build(), FAMILIES[family].batch(prompts))
    rows = torch.cat([y.flatten(0, 1) for _, y, _ in vision.calls])
    projected = vision.project(vision.features)
    assert projected is not None
    torch.testing.assert_close(projected, rows, rtol=1e-4, atol=1e-5)
    picked = torch.tensor([3, 0, 2])  # one row at a time, out of order
    torch.testing.assert_close(vision.project(vision.features[picked]), rows[picked], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llava", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "internvl", "smolvlm"])
def test_attention_received_is_that_of_the_eager_map(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = FAMILIES[family].build("eager")
    anatomy = vtprune.inspect(model)
    layer = vision_layers(anatomy)[layer_number(anatomy, "feature")]
    maps: list[torch.Tensor] = []
    home = sys.modules[type(layer).__module__]
    original = home.eager_attention_forward

    def watched(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        output, weights = original(module, *args, **kwargs)
        if any(module is part for part in layer.modules()):
            maps.append(weights)
        return output, weights

    monkeypatch.setattr(home, "eager_attention_forward", watched)
    attention = prefill(model, FAMILIES[family].batch(PROMPTS)).attention
    found = torch.cat([a.received().flatten() for a in attention])
    expected = torch.cat([m.mean((1, 2)).flatten() for m in maps])  # column means, heads and queries averaged
    torch.testing.assert_close(found, expected)
    if family in ("llava", "internvl"):
        found = torch.cat([a.of_class_token().flatten() for a in attention])
        torch.testing.assert_close(found, torch.cat([m[:, :, 0].mean(1).flatten() for m in maps]))


def test_whole_image_layer_is_taken_where_others_see_windows() -> None:
    model = FAMILIES["qwen2_5_vl"].build()
    anatomy = vtprune.inspect(model)
    assert anatomy.vision_tower.fullatt_block_indexes == [2]
    assert [layer_number(anatomy, which) for which in ("feature", "last", 0)] == [2, 2, 2]
    with pytest.raises(vtprune.MethodError, match="3 layers"):
        layer_number(anatomy, 3)


def test_feature_layer_is_the_one_whose_state_is_projected() -> None:
    for family, option, expected in (("llava", -2, 1), ("llava", 2, 1), ("llava", [-3, -1], 2), ("qwen3_vl", None, 2)):
        config = FAMILIES[family].config()
        if option is not None:
            config.vision_feature_layer = option
        from transformers import AutoModelForImageTextToText

        assert layer_number(vtprune.inspect(AutoModelForImageTextToText.from_config(config)), "feature") == expected


@pytest.mark.parametrize("family", ["internvl", "smolvlm"])
def test_patches_of_a_row_are_those_of_the_pixel_shuffle(family: str) -> None:
    model = FAMILIES[family].build()
    plane = torch.arange(64.0).reshape(1, 64, 1)
    if family == "internvl":
        shuffled = model.model.pixel_shuffle(plane.view(1, 8, 8, 1), 0.5).reshape(16, 4)
    else:
        shuffled = model.model.connector.pixel_shuffle(plane, 2).reshape(16, 4)
    torch.testing.assert_close(patches_of_rows(plane, 16, False)[0, :, :, 0].sort(1).values, shuffled.sort(1).values)
    values = torch.randn(4, 3)
    spread = over_patches(values, 64, 16, False)
    torch.testing.assert_close(patches_of_rows(spread[None], 16, False)[0], values.expand(16, 4, 3))


def test_patches_that_fit_no_square_are_refused() -> None:
    with pytest.raises(vtprune.MethodError, match="60 vision patches"):
        patches_of_rows(torch.zeros(1, 60, 1), 15, False)
    assert patches_of_rows(torch.zeros(1, 60, 1), 15, True).shape == (1, 15, 4, 1)


def test_crops_are_those_of_the_projector_call() -> None:
    family = FAMILIES["llava_next"]
    tokens, vision = read(family.build(), family.batch(PROMPTS))
    rows = torch.cat([y.flatten(0, 1) for _, y, _ in vision.calls])  # 16 to a crop
    assert vision.crop is not None
    for token in range(len(tokens)):
        same = (rows == tokens.hidden[token]).all(1).nonzero()[:, 0]
        assert vision.crop[token] == (same[0] // 16 if len(same) else -1)
    assert set(vision.crop.tolist()) > {-1, 0, 1, 2}


def shrinking_onevision() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A LLaVA-OneVision whose tile grid is shrunk, and a prompt with one picture."""
    family = FAMILIES["llava_onevision"]
    torch.manual_seed(0)
    from transformers import AutoModelForImageTextToText

    config = family.config()
    config.vision_aspect_ratio = "anyres_max_1"
    model = AutoModelForImageTextToText.from_config(config).eval()
    size = torch.tensor([[40, 40]])
    empty = [torch.zeros(5, 16, 1)]
    aspect = {"vision_aspect_ratio": config.vision_aspect_ratio}
    _, lengths = model.model.pack_image_features(empty, size, image_newline=torch.zeros(1), **aspect)
    ids = torch.tensor([[1, 20, *[IMAGE] * int(lengths[0]), 30, 31]])
    assert int(lengths[0]) == 16 + 4 * 5  # 8 x 8 tile patches become 4 x 4 and a newline each
    return model, {"input_ids": ids, "pixel_values": torch.randn(1, 5, 3, 16, 16), "image_sizes": size}


def test_shrunk_tiles_are_blended_as_the_model_blends_them() -> None:
    model, batch = shrinking_onevision()
    tokens, vision = read(model, batch)
    (_, y, _) = vision.calls[0]
    placed = vision.index >= 0
    torch.testing.assert_close(vision.to_tokens(y.flatten(0, 1))[placed], tokens.hidden[placed])
    assert int((~placed).sum()) == 4
    grid = vision.crop[16:].view(4, 5)[:, :4]  # thumbnail first, then the tile grid
    assert torch.equal(grid, torch.tensor([[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]]))
    for method in ("zoo_prune", "visionzip", "vispruner", "prumerge", "cdpruner", "vflowopt", "pooling"):
        with torch.no_grad(), vtprune.patch(model, ratio=0.4, method=method) as patch:
            model(**batch)
        assert len(patch.last.kept[0]) == round(0.4 * 36)


def test_beams_share_the_patches_of_their_sample() -> None:
    family, reader = FAMILIES["qwen2_5_vl"], Reader()
    model = family.build()
    with vtprune.patch(model, ratio=0.5, method=reader):
        model.generate(**family.batch(PROMPTS[:2]), max_new_tokens=1, num_beams=3, do_sample=False)
    tokens, vision = reader.seen[-1]
    rows = torch.cat([y.flatten(0, 1) for _, y, _ in vision.calls])
    assert len(tokens) == 3 * len(rows) and len(torch.unique(tokens.feature)) == len(tokens) // 3
    torch.testing.assert_close(vision.to_tokens(rows), tokens.hidden)


def test_importance_sums_to_one_per_image_without_a_class_token() -> None:
    family = FAMILIES["qwen2_vl"]
    reader = prefill(family.build(), family.batch(PROMPTS))
    tokens, _ = reader.seen[-1]
    sums = torch.zeros(3).index_add_(0, tokens.image, reader.importance)
    torch.testing.assert_close(sums * 4, torch.ones(3))  # a token has the mean of its four patches


def test_class_states_are_refused_without_a_class_token() -> None:
    family = FAMILIES["llava"]
    _, vision = read(family.build(), family.batch(PROMPTS[:1]))
    x, _, _ = vision.calls[0]
    assert vision.class_states().shape == (1, x.shape[2])
    family = FAMILIES["llava_onevision"]
    _, vision = read(family.build(), family.batch(PROMPTS[:1]))
    with pytest.raises(vtprune.MethodError, match="class token"):
        vision.class_states()


def test_missing_pixels_and_missing_projector_are_named() -> None:
    family = FAMILIES["llava"]
    model, batch = family.build(), family.batch(PROMPTS[:1])
    with torch.no_grad():
        features = model.get_image_features(pixel_values=batch.pop("pixel_values"), return_dict=True)
        did_not_run = pytest.raises(vtprune.MethodError, match="did not run")
        with vtprune.patch(model, ratio=0.5, method="zoo_prune"), did_not_run:
            model(**batch, mm_encoder_outputs={"image": features})
    anatomy = vtprune.inspect(model)
    anatomy.projector = None
    with pytest.raises(vtprune.MethodError, match="no projector"):
        projector_tap(anatomy, "zoo_prune")


def test_states_that_were_changed_on_the_way_are_refused() -> None:
    family = FAMILIES["llava"]
    tokens, vision = read(family.build(), family.batch(PROMPTS[:1]))
    tokens.hidden = tokens.hidden * 2.0  # scaled, as some models do: still the same rows
    torch.testing.assert_close(Vision(tokens, "reader").index, vision.index)
    tokens.hidden = tokens.hidden.flip(0) + 1.0
    with pytest.raises(vtprune.MethodError, match="could not trace 25 of 25"):
        Vision(tokens, "reader")


def test_padded_patches_neither_give_nor_take_attention() -> None:
    family = FAMILIES["smolvlm"]
    batch = family.batch([[3, Image(0), 5]])
    mask = torch.ones(1, 1, 32, 32, dtype=torch.long)
    mask[..., 16:] = 0  # the right half of the picture is padding
    for attention in ("sdpa", "eager"):
        reader = prefill(family.build(attention), {**batch, "pixel_attention_mask": mask})
        received = reader.attention[0].received().view(8, 8)
        assert math.isclose(float(received[:, :4].sum()), 1.0, rel_tol=1e-5)
        assert (received[:, 4:] == 0).all() and (received[:, :4] > 0).all()


@dataclass
class Twice(Reader):
    """Reads attention from the layer's own call, and from running the layer again."""

    pairs: list = field(default_factory=list)

    def choose(self, tokens: Tokens) -> Choice:
        for rope in (True, False):
            own = Vision(tokens, "reader").attention(rope)
            records = [record._replace(watch=None) for record in tokens.recorded[LAYER]]
            again = Vision(replace(tokens, recorded={**tokens.recorded, LAYER: records}), "reader").attention(rope)
            assert all(record.watch is not None and record.watch.calls for record in tokens.recorded[LAYER])
            self.pairs += [(a.query, b.query, a.key, b.key) for a, b in zip(own, again, strict=True)]
        return super().choose(tokens)


@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "smolvlm"])
def test_a_layers_own_call_tells_what_running_it_again_would(family: str) -> None:
    model, reader = FAMILIES[family].build(), Twice()
    with vtprune.patch(model, ratio=0.5, method=reader):
        model(**FAMILIES[family].batch(PROMPTS[:2]))
    assert len(reader.pairs) >= 2
    for query, again, key, key_again in reader.pairs:
        assert not query.requires_grad
        torch.testing.assert_close(query, again, rtol=0, atol=0)
        torch.testing.assert_close(key, key_again, rtol=0, atol=0)


def test_sampled_rows_are_spread_over_every_picture() -> None:
    for size, count in ((2048, 512), (2304, 512), (100, 7), (10, 10), (5, 1)):
        places = stratified(size, count).nonzero()[:, 0]
        runs = (places.double() * count / size).floor()
        assert count * 0.95 <= len(places) <= count and len(runs.unique()) >= 0.9 * count
    columns = stratified(48 * 48, 576).nonzero()[:, 0] % 48  # a stride of 4 would sample only every fourth column
    assert columns.bincount(minlength=48).min() > 0
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 2, 2500, 8, generator=generator) for _ in range(2))
    attention = Attention(query, key, 0.3, torch.tensor([0, 400, 2500]), None, 0)
    assert attention.sampled("all") is None and Attention(query, key, 0.3, None, None, 0).sampled(3000) is None
    rows = attention.sampled("auto")
    assert rows is not None and bool(rows[:400].all()) and 480 < int(rows[400:].sum()) <= 512
    found, exact = attention.received(rows), attention.received()
    torch.testing.assert_close(found[:, :400], exact[:, :400])
    torch.testing.assert_close(found[:, 400:].sum(), torch.tensor(1.0))
    assert torch.corrcoef(torch.cat([found[:, 400:], exact[:, 400:]]))[0, 1] > 0.9
    valid = torch.zeros(1, 2500, dtype=torch.bool)
    valid[:, :2100] = True
    padded = Attention(query, key, 0.3, None, valid, 0).sampled("auto")
    assert padded is not None and 480 < int(padded.sum()) <= 512 and not bool(padded[:, 2100:].any())
