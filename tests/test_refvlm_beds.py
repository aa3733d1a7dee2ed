# SPDX-License-Identifier: Apache-2.0
"""Crowds, pages and clips, the processor for them, and the training of the built-in Qwen2.5-VL."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from tools.refvlm.qwen2_5_vl import build, data, train
from tools.refvlm.qwen2_5_vl.learner import Learner
from vtprune.refvlm import clips, crowds, pages

SEEDS = range(12)


@pytest.mark.parametrize("make", [crowds.crowd, pages.page, clips.clip])
def test_a_seed_always_gives_the_same(make):
    for seed in SEEDS:
        one, other = make(seed), make(seed)
        first, second = ((x.frames if make is clips.clip else (x.image,)) for x in (one, other))
        assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
        assert one.questions == other.questions and one.questions
        rows, columns = one.grid
        assert all(image.size == (columns * 12, rows * 12) for image in first)
        layers = len(first) // 2 if make is clips.clip else 1
        for question in one.questions:
            assert all(isinstance(patch, int) and 0 <= patch < layers * rows * columns for patch in question.patches)
            assert len(set(question.patches)) == len(question.patches) > 0


def test_crowds_hold_small_objects_apart():
    for seed in SEEDS:
        crowd = crowds.crowd(seed, (24, 24))
        assert len(crowd.objects) >= 8
        cells = [cell for thing in crowd.objects for cell in thing.patches]
        assert len(cells) == len(set(cells)), "two objects share a visual token"
        pixels = np.asarray(crowd.image).astype(int)
        for thing in crowd.objects:
            assert np.abs(pixels[thing.y, thing.x] - thing.rgb).sum() < 30 or thing.digit, "wrong color at its position"
            assert (thing.vertical, thing.horizontal) == (
                "bottom" if 2 * thing.y > 288 else "top",
                "right" if 2 * thing.x > 288 else "left",
            )


def test_pages_say_what_they_answer():
    for seed in SEEDS:
        page = pages.page(seed, (16, 14))
        for question in page.questions:
            if question.kind == "line":
                number = int(question.text.split()[3])
                assert question.answer == " ".join(word.text for word in page.lines[number - 1])
            if question.kind == "page presence":
                words = {word.text for word in page.words}
                assert question.answer == ("yes" if question.text.split()[-1][:-1] in words else "no")
        for word in page.words:  # every patch of a word contains ink
            ink = page.drawn.reshape(16, 12, 14, 12).any((1, 3)).ravel()
            assert ink[list(word.patches)].all()


def test_glyphs_differ():
    drawn = {character: pages.glyph(character).tobytes() for character in pages._FONT}
    assert len(set(drawn.values())) == len(drawn)
    assert pages.glyph("l")[:, 0].all() and pages.glyph("t")[0].all()


def test_clips_answer_what_happens():
    kinds = set()
    for seed in range(30):
        clip = clips.clip(seed)
        kinds |= {question.kind for question in clip.questions}
        hero, final = clip.steps[0][0], clip.steps[-1][0]
        for question in clip.questions:
            if question.kind == "goes":
                assert question.answer == f"{final.vertical} {final.horizontal}" != f"{hero.vertical} {hero.horizontal}"
            if question.kind == "becomes":
                assert question.answer == final.color != hero.color
            if question.kind == "after":
                order = [shown[0].shape for shown in clip.steps]
                assert order[order.index(question.text.split()[-1][:-1]) + 1] == question.answer
    assert kinds == {"goes", "starts", "moves", "becomes", "changes", "after", "before"}


@pytest.fixture(scope="module")
def processor():
    return build.processor()


def test_pictures_and_clips_stand_between_marks(processor):
    pictures = [crowds.crowd(1, (12, 12)).image, pages.page(1, (8, 8)).image]
    inputs = processor(images=pictures, text="<image> <image> which image has a star? answer:")
    words = processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0].tolist())
    assert words[:2] == ["<bos>", "<vision_start>"] and words[146:148] == ["<vision_end>", "<vision_start>"]
    assert words.count("<image>") == 144 + 64 and "<unk>" not in words
    clip = clips.clip(3, (6, 6), steps=4)
    inputs = processor(videos=list(clip.frames), text="<video> what moves? answer:")
    assert inputs["video_grid_thw"].tolist() == [[4, 12, 12]]
    assert inputs["mm_token_type_ids"].sum() == 2 * 4 * 36
    with pytest.raises(ValueError, match="7 frames; expected an even number"):
        processor(videos=list(clip.frames)[:7], text="<video> what moves? answer:")
    with pytest.raises(ValueError, match="found 1 <video> in the text and 0 clips"):
        processor(text="<video> what moves? answer:")


def test_pictures_keep_their_size(processor):
    for size, tokens in (((48, 48), 16), ((432, 432), 1296), ((168, 120), 140), ((1000, 1000), 1296)):
        inputs = processor(images=Image.new("RGB", size), text="<image> answer:")
        assert int((inputs["input_ids"] == processor.image_token_id).sum()) == tokens


@torch.no_grad()
@pytest.mark.parametrize(("kind", "grid"), [("scene", (9, 12)), ("pair", (6, 6)), ("clip", (5, 5)), ("page", (14, 14))])
def test_training_computes_what_the_model_computes(processor, kind, grid):
    """The packed rows of training give the logits of the stock model on the processor's inputs."""
    model = build.build(3).eval()
    stock = build.build(3).eval()
    stock.load_state_dict(model.state_dict())
    batch = data.held_out(kind, grid, 2)
    learner = Learner(model)
    seen = learner.see(batch)
    _, predicted = learner.answer(batch, seen)
    row, number = 1, 2
    _, question, answer = batch.asked[row][number - 1]
    words = {"pair": "<image> <image>", "clip": "<video>"}.get(kind, "<image>")
    text = f"{words} {question} answer: {answer}"
    frames = _frames(kind, grid, row)
    inputs = processor(text=text, **({"videos": frames} if kind == "clip" else {"images": frames}))
    logits = stock(**inputs).logits[0]
    length = len(data.encode(answer))
    wanted = logits[-length - 1 :].argmax(-1)
    mine = (batch.segments[row] == number) & (batch.labels[row] != data.IGNORE)
    assert predicted[row][mine].tolist() == wanted.tolist()


def _frames(kind, grid, row):
    """The pictures of a held-out row, as PIL."""
    rows = []
    original = data.pack

    def keep(kind, found, *rest):
        rows.extend(found)
        return original(kind, found, *rest)

    data.pack = keep
    try:
        data.held_out(kind, grid, 2)
    finally:
        data.pack = original
    return [Image.fromarray(frame) for frame in rows[row].frames]


@torch.no_grad()
def test_growing_changes_nothing_at_first(processor):
    small = build.build(build.SEED_LAYERS).eval()
    large = build.grown(small).eval()
    inputs = processor(images=crowds.crowd(1, (8, 8)).image, text="<image> where is the star? answer:")
    torch.testing.assert_close(large(**inputs).logits, small(**inputs).logits, rtol=1e-4, atol=1e-4)
    assert len(large.model.language_model.layers) == build.LAYERS >= 12
    assert 2 * sum(weight.numel() for weight in large.parameters()) <= 12_000_000
    later = large.model.language_model.layers[build.KEPT[1] + 2]
    later.mlp.down_proj.weight.normal_()
    assert not torch.allclose(large(**inputs).logits, small(**inputs).logits)


def test_a_run_goes_on(tmp_path, monkeypatch):
    """A run that stopped before the decoder grows resumes there, and grows it."""
    monkeypatch.setattr(train, "HELD_OUT", (("scene", (6, 6), 2),))
    monkeypatch.setattr(train, "begin", lambda folder: build.build(build.SEED_LAYERS))
    monkeypatch.setattr(data.Source, "__init__", _small_source)
    monkeypatch.setattr(data, "SIZES", {kind: {(5, 5): 1} if kind != "page" else {(8, 8): 1} for kind in data.KINDS})
    sizes = ["--budget", "150", "--look-budget", "60", "--parts", "1", "--look", "2", "--small", "2"]
    common = ["--out", str(tmp_path), "--earlier", str(tmp_path), *sizes]
    train.main([*common, "--steps", "4", "--cooldown", "1"])
    train.main([*common, "--steps", "6", "--cooldown", "1"])

    curve = json.loads((tmp_path / "curve.json").read_text())
    assert [row["step"] for row in curve] == [2, 3, 4, 5, 6]
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "weights")
    assert len(model.model.language_model.layers) == build.LAYERS


def _small_source(self, seed=0, pool=0, easy=False):
    self.seed, self.base, self.easy = seed, 10**6, []
    self.scenes = [(np.asarray(s.image), s.objects) for s in (data.scenes.scene(10**6 + n) for n in range(3))]
    self.backgrounds = [crowds.backdrop(10**6, (24, 24))]
