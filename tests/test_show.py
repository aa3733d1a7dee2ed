# SPDX-License-Identifier: Apache-2.0
"""Output of `patch.last`: pictures, heat maps, explanations of tokens, reports, logs; and streaming."""

from __future__ import annotations

import copy
import gc
import json
import pickle
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import TextIteratorStreamer

import vtprune
from vtprune import refvlm
from vtprune.report import explain
from vtprune.report.draw import dim, heat, paint_values
from vtprune.report.patch_boxes import PictureError

SCENE = refvlm.scenes.scene(7)
QUESTION = refvlm.prompt(SCENE.questions[0].text)


@pytest.fixture(scope="module")
def embedded():
    model, processor = refvlm.load()
    inputs = processor(images=SCENE.image, text=QUESTION, return_tensors="pt")
    return model, processor, inputs


def _run(embedded, method="iwp", **options):
    model, _, inputs = embedded
    with vtprune.patch(model, ratio=0.1, method=method) as patch, torch.no_grad():
        model(**inputs, **options)
        return patch, patch.last


def test_kept_pixels_are_the_originals_and_dropped_ones_are_dark(embedded):
    _, last = _run(embedded)
    panel = np.asarray(last.show(SCENE.image).panels()[0][0])
    original = np.asarray(SCENE.image.convert("RGB"))
    assert panel.shape == original.shape
    cell = original.shape[0] // refvlm.scenes.GRID
    kept = {int(column - last.visual[0][0]) for column in last.kept[0]}
    for token in range(len(last.visual[0])):
        here = np.s_[token // 12 * cell : (token // 12 + 1) * cell, token % 12 * cell : (token % 12 + 1) * cell]
        assert (panel[here] == original[here]).all() == (token in kept)
        assert panel[here].mean() <= original[here].mean()


def test_stages_are_rows_and_their_captions_tell_the_counts(embedded):
    _, last = _run(embedded, "pyramiddrop")
    shown = last.show(SCENE.image, stages=True)
    captions = [caption for _, caption in shown.panels()]
    assert captions == [f"before layer {layer}: {len(kept[0])} of 144 kept" for layer, kept in last.stages]
    assert len(captions) > 1 and shown.image.height > last.show().image.height


def test_heat_rises_with_the_score_and_methods_without_scores_say_so(embedded):
    _, last = _run(embedded)
    view = last.show(SCENE.image).views[0]
    ranks = last.scores[0].argsort().argsort().numpy() / 143
    expected = heat(view.picture, view.boxes, ranks)
    assert np.asarray(last.heatmap().panels()[0][0]).tobytes() == np.asarray(expected).tobytes()
    with pytest.raises(PictureError, match="divprune gave no scores"):
        _run(embedded, "divprune")[1].heatmap(SCENE.image)
    with pytest.raises(PictureError, match="cuts with scores: \\[0\\]"):
        last.heatmap(stage=3)


def test_saved_files_and_notebooks_show_the_same(embedded, tmp_path):
    _, last = _run(embedded)
    assert "<img" not in last._repr_html_() and "visual tokens" in last._repr_html_()
    last.save(tmp_path / "kept.png", SCENE.image)
    assert Image.open(tmp_path / "kept.png").tobytes() == last.show().image.tobytes()
    assert last._repr_html_().count("data:image/png;base64,") == 1
    assert last.show()._repr_png_()[:4] == b"\x89PNG"
    with pytest.raises(PictureError, match="cannot write a picture"):
        last.save(tmp_path / "no" / "kept.png")
    with pytest.raises(PictureError, match="unknown file extension.*expected a name such as kept.png"):
        last.save(tmp_path / "kept.nothing", SCENE.image)


def test_other_pictures_are_refused(embedded):
    _, last = _run(embedded)
    with pytest.raises(PictureError, match="does not match the 1 crops"):
        last.show(refvlm.scenes.scene(8).image)
    with pytest.raises(PictureError, match="2 pictures were given"):
        last.show([SCENE.image, SCENE.image])
    with pytest.raises(PictureError, match="is no picture"):
        last.show(np.full((4, 4, 3), 300.0))
    with pytest.raises(PictureError, match="expected one of"):
        last.show(SCENE.image, fit="zoom")


def test_any_form_of_the_same_picture_is_shown_alike(embedded, tmp_path):
    _, last = _run(embedded)
    SCENE.image.save(tmp_path / "scene.png")
    array = np.asarray(SCENE.image.convert("RGB"))
    tensor = torch.tensor(array).permute(2, 0, 1)
    want = last.show(SCENE.image).image.tobytes()
    for form in (array, tensor, tensor / 255, str(tmp_path / "scene.png"), array[None], [SCENE.image]):
        assert last.show(form).image.tobytes() == want


def test_without_pixels_a_square_picture_is_shown_and_a_long_one_asks_how_it_was_cut(embedded):
    model, processor, _ = embedded
    long = SCENE.image.resize((300, 150))
    with vtprune.patch(model, ratio=0.1) as patch, torch.no_grad():
        model(**processor(images=long, text=QUESTION, return_tensors="pt"))
        assert patch.last.show(long).views[0].boxes.max() == 1.0  # found by its pixels
        last = pickle.loads(pickle.dumps(patch.last))  # a pickle carries none
    with pytest.raises(PictureError, match="fit= as one of"):
        last.show(long)
    assert last.show(long, fit="stretch").views[0].boxes.tolist() == patch.last.show(long).views[0].boxes.tolist()
    assert last.show(SCENE.image).views[0].boxes.max() == 1.0
    assert copy.copy(last).show().views[0].picture.size == (12 * 24, 12 * 24)  # a placeholder


@pytest.mark.parametrize("pattern", ["stripes", "noise", "flat"])
def test_pictures_without_coarse_features_are_recognized(embedded, pattern):
    model, processor, _ = embedded
    array = np.full((200, 500, 3), 90, np.uint8)
    if pattern == "stripes":
        array[:, np.arange(500) % 7 < 3] = 255
    elif pattern == "noise":
        array[:] = np.random.default_rng(0).integers(0, 256, array.shape)
    with vtprune.patch(model, ratio=0.1) as patch, torch.no_grad():
        model(**processor(images=Image.fromarray(array), text=QUESTION, return_tensors="pt"))
        assert patch.last.show(array).views[0].boxes[-1].tolist() == [11 / 12, 11 / 12, 1, 1]
        with pytest.raises(PictureError, match="does not match") if pattern == "noise" else nullcontext():
            patch.last.show(SCENE.image.resize((500, 200)))


def test_an_account_does_not_keep_pixels_alive(embedded):
    patch, last = _run(embedded)
    assert last.source.crops("image") is not None
    patch._session.state.thread.encoded.clear()
    inputs = dict(embedded[2])
    assert last.source.pixels["image"]() is inputs["pixel_values"]
    model, processor, _ = embedded
    with vtprune.patch(model, ratio=0.1) as other, torch.no_grad():
        model(**processor(images=SCENE.image, text=QUESTION, return_tensors="pt"))
        other._session.state.thread.encoded.clear()
        gc.collect()
        assert other.last.source.crops("image") is None


def test_beams_show_one_picture(embedded):
    model, _, inputs = embedded
    with vtprune.patch(model, ratio=0.1) as patch:
        model.generate(**inputs, max_new_tokens=2, num_beams=3, do_sample=False)
        assert len(patch.last.visual) == 3
        assert len(patch.last.show(SCENE.image).panels()) == 1


@pytest.mark.parametrize("method", ["iwp", "sparsevlm"])
def test_why_tells_score_rank_and_the_nearest_kept_token(embedded, method):
    with explain.recording():
        _, last = _run(embedded, method)
    states, alive = last.states, [last.alive(stage) for stage in range(len(last.stages))]
    for token in range(0, 144, 7):
        why = last.explain_token(token)
        stage = [layer for layer, _ in last.stages].index(why.layer)
        assert why.kept == (token in last.kept_flat[-1]) and why.rank_of == len(alive[stage])
        place = alive[stage].tolist().index(token)
        scores = last.scores[stage]
        assert why.score == float(scores[place])
        assert why.rank == sorted(scores.tolist(), reverse=True).index(why.score) + 1
        near = {
            int(other): float(torch.cosine_similarity(states[stage][row], states[stage][place], dim=0))
            for row, other in enumerate(alive[stage])
            if other in last.kept_flat[stage] and other != token
        }
        assert why.similarity == pytest.approx(max(near.values()), abs=1e-5)
        assert near[why.duplicate] == pytest.approx(why.similarity, abs=1e-5)
    json.dumps(last.explain_token(3).to_dict())


def test_why_without_recording_knows_no_duplicate_and_keeps_no_states(embedded):
    _, last = _run(embedded)
    assert last.states == [None] * len(last.stages)
    assert last.explain_token(0).duplicate is None and last.explain_token(0).score is not None
    with pytest.raises(vtprune.VTPruneError, match="numbered from 0"):
        last.explain_token(144)


def test_the_report_is_text_and_the_log_is_json(embedded):
    _, last = _run(embedded)
    record = json.loads(json.dumps(last.to_dict(), allow_nan=False))
    assert (record["visual_tokens"], record["kept_tokens"]) == (144, 14) == last.tokens
    assert record["kv_bytes_after"] < record["kv_bytes"] and record["stages"] == [[record["stages"][0][0], [14]]]
    assert "144 -> 14" in last.report() == str(last)
    # What an interactive session prints is one line, not the tensors.
    assert repr(last) == "Pruning(iwp, ratio=0.1, 144 -> 14 visual tokens)"
    assert repr(last.show(SCENE.image)) == f"Pictures(1 of {last!r}, mode='dropped')"


def test_a_streamer_gets_every_token_of_a_pruned_generation(embedded):
    model, processor, inputs = embedded
    with vtprune.patch(model, ratio=0.1) as patch:
        out = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        streamed = model.generate(**inputs, max_new_tokens=6, do_sample=False, streamer=streamer)
        assert patch.last.tokens == (144, 14)
    answer = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert torch.equal(out, streamed) and answer.strip()
    assert "".join(streamer) == answer


def test_cells_meet_without_gaps_and_what_no_token_shows_is_veiled():
    boxes = np.array([[0.2, 0, 0.5, 1], [0.5, 0, 0.9, 1], [0.9, 0, 1.4, 1]])  # the last one reaches into padding
    cells = paint_values((10, 3), boxes, np.array([0.0, 1.0, 2.0]))
    assert np.isnan(cells[:, :2]).all() and (cells[:, 2:] == [0] * 3 + [1] * 4 + [2]).all()
    out = np.asarray(dim(Image.new("RGB", (10, 3), (200, 40, 0)), boxes, np.array([0.0, 1.0, 1.0])))
    assert (out[:, 2:5] == (200, 40, 0)).all()
    assert (out[:, :2].sum(-1) > 240).all() and (out[:, 5:].sum(-1) < 240).all()
