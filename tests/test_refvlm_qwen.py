# SPDX-License-Identifier: Apache-2.0
"""The second built-in model: a stock Qwen2.5-VL whose pictures keep their shape."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import vtprune
from tools.refvlm import average, data, qwen_learner
from tools.refvlm.qwen2_5_vl import build, train
from tools.refvlm.qwen2_5_vl import data as batches
from vtprune import refvlm
from vtprune.refvlm import beds, clip_inputs, evaluate, loading


@pytest.fixture(scope="module")
def loaded():
    return refvlm.load(name="qwen2_5_vl")


def asked(processor, images, words=("is there a star?", "where is the red sign?")):
    return processor(images=images, text=[refvlm.prompt(text) for text in words], padding=True, return_tensors="pt")


def test_it_is_a_small_stock_model(loaded):
    model, _ = loaded
    assert type(model).__name__ == "Qwen2_5_VLForConditionalGeneration" and not model.training
    vision, text = model.config.vision_config, model.config.text_config
    assert vision.spatial_merge_size == 2 and 0 < len(vision.fullatt_block_indexes) < vision.depth
    assert text.num_hidden_layers >= 6 and text.num_key_value_heads < text.num_attention_heads
    folder = refvlm.MODELS["qwen2_5_vl"]
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 12_000_000


def test_a_picture_keeps_its_shape(loaded):
    _, processor = loaded
    square, wide = refvlm.scenes.scene(3).small, refvlm.scenes.scene(4).image.resize((400, 150))
    inputs = asked(processor, [square, wide])
    grids = inputs["image_grid_thw"].tolist()
    assert grids[0] == [1, 24, 24] and grids[1][2] > 2 * grids[1][1]
    tokens = (inputs["input_ids"] == processor.image_token_id).sum(dim=1)
    assert tokens.tolist() == [rows * columns // 4 for _, rows, columns in grids]
    assert torch.equal(inputs["mm_token_type_ids"], (inputs["input_ids"] == processor.image_token_id).int())
    sizes = [(12, 12), (1000, 999), (2000, 2000), (480, 240)]
    many = asked(processor, [refvlm.scenes.scene(3).image.resize(size) for size in sizes], ["what?"] * len(sizes))
    counts = (many["input_ids"] == processor.image_token_id).sum(dim=1)
    assert counts.min() == 16 and 1200 <= counts[:3].max() <= 1300, "small ones are enlarged, large ones reduced"
    assert counts[3] == 40 * 20


def test_pictures_and_their_words_are_equally_many(loaded):
    _, processor = loaded
    with pytest.raises(ValueError, match="found 2 <image> in the text and 1 pictures"):
        asked(processor, [refvlm.scenes.scene(3).image])


def test_chat_template_is_the_training_prompt(loaded):
    _, processor = loaded
    image = refvlm.scenes.scene(3).image
    content = [{"type": "text", "text": "is there a star?"}, {"type": "image", "image": image}]
    chat = [{"role": "user", "content": content}]
    inputs = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)
    wanted = processor(images=image, text=refvlm.prompt("is there a star?"))
    assert torch.equal(torch.as_tensor(inputs["input_ids"]), wanted["input_ids"])


@pytest.mark.parametrize("ratio", [1.0, 0.1])
def test_it_sees(loaded, ratio):
    model, processor = loaded
    samples = list(evaluate.held_out_scenes(70))
    with vtprune.patch(model, ratio=ratio) as patch:
        answers = evaluate.answer(model, processor, samples, batch_size=35)
        assert len(patch.last.kept[0]) == round(144 * ratio)
    right = sum(given == sample.answer for given, sample in zip(answers, samples, strict=True))
    assert right / len(samples) >= 0.85


def test_it_sees_wide_pictures(loaded):
    samples = [s._replace(image=s.image.resize((180, 110))) for s in evaluate.held_out_scenes(70)]
    answers = evaluate.answer(*loaded, samples, batch_size=35)
    assert sum(given == sample.answer for given, sample in zip(answers, samples, strict=True)) / len(samples) >= 0.8


@pytest.mark.parametrize("name", ["crowds 16 x 16", "pages 12 x 12", "pairs 9 x 9", "clips 6 x 6"])
def test_it_sees_what_it_was_trained_on(loaded, name):
    samples = beds.samples(name, 16)
    answers = [evaluate.answer_alone(*loaded, sample) for sample in samples]
    assert sum(given == sample.answer for given, sample in zip(answers, samples, strict=True)) >= 10
    assert len({sample.kind for sample in samples}) >= 3
    pictures = 2 if name.startswith("pairs") else 2 * beds.STEPS if name.startswith("clips") else 1
    assert {len(sample.pictures) for sample in samples} == {pictures}


def test_beds_are_refused_for_a_model_that_does_not_know_them(capsys):
    with pytest.raises(SystemExit):
        evaluate.main(["--model", "llava", "--scenes", "0", "--beds", "1"])
    assert "which llava does not know; use qwen2_5_vl" in capsys.readouterr().err


def test_the_command_line_knows_it(loaded):
    model, _ = loading.model_and_processor("embedded-qwen2_5_vl", device="cpu")
    assert model.config.model_type == loading.config("embedded-qwen2_5_vl")[0].model_type == "qwen2_5_vl"
    with pytest.raises(ValueError, match="expected one of llava, qwen2_5_vl"):
        refvlm.load(name="qwen")


@pytest.mark.parametrize("size", [(144, 144), (120, 168)])
def test_training_sees_what_the_processor_makes(loaded, size):
    _, processor = loaded
    image = refvlm.scenes.scene(3).image.resize(size[::-1], Image.Resampling.BICUBIC)
    mine = qwen_learner.flatten_patches(data.pixels(torch.from_numpy(np.array(image))[None]))
    torch.testing.assert_close(mine, processor.image_processor(images=image, return_tensors="pt")["pixel_values"])


@torch.no_grad()
def test_training_attends_and_counts_positions_as_the_model_does():
    model, _ = refvlm.load(name="qwen2_5_vl")
    grid = torch.tensor([[1, 24, 24], [1, 16, 34]])
    pixels = torch.randn(int(grid.prod(-1).sum()), 216)
    stock = model.model.visual(pixels, grid_thw=grid).pooler_output
    learner = qwen_learner.QwenLearner(model)
    torch.testing.assert_close(model.model.visual(pixels, grid_thw=grid).pooler_output, stock)

    batch = data.Pool(0, 0, 1, 4, 0, with_easy=False).batch(0, 2, 0, 0.0, ((120, 168),))
    prefix = 1 + batch.patches.shape[1]
    assert prefix == 1 + 10 * 14 and tuple(batch.images.shape[1:3]) == (120, 168)
    ids = torch.full((2, prefix + 5), 12)
    ids[:, 1:prefix] = model.config.image_token_id
    types = (ids == model.config.image_token_id).int()
    wanted, _ = model.model.get_rope_index(ids, types, image_grid_thw=torch.tensor([[1, 20, 28]] * 2))
    found = learner.positions(batch, prefix)
    assert torch.equal(found[:, :, : prefix + 5], wanted)


def test_clips_get_the_marks_of_a_processor_that_has_them(loaded):
    """Prompts of clips contain the marks of the processor in `tools/refvlm/qwen2_5_vl`."""
    frames = refvlm.clips.clip(5, (12, 12)).frames[:4]
    processor = build.processor()
    made = clip_inputs.inputs(loaded[0], processor, frames, " what? answer:")
    words = processor.tokenizer.convert_ids_to_tokens(made["input_ids"][0].tolist())
    count = int(made["video_grid_thw"].prod()) // 4
    assert words[:2] == ["<bos>", "<vision_start>"] and words[2 : 2 + count] == ["<video>"] * count
    assert words[2 + count :] == ["<vision_end>", "what", "?", "answer", ":"]
    plain = clip_inputs.inputs(loaded[0], loaded[1], frames, " what? answer:")
    assert torch.equal(made["pixel_values_videos"], plain["pixel_values_videos"])


def test_short_pages_grow_and_ask_where_words_are():
    source = batches.Source(pool=2, easy=False)
    for stage in range(len(batches.SHORT)):
        batch = source.short_pages(7, 2800, stage)
        rows = batch.grids[0][1]
        assert batch.kind == "page" and (rows, batch.grids[0][2]) in batches.SHORT[stage]
        numbers = batch.cells[..., batches.NAMES.index("line")]
        lines = int(numbers[numbers < 10].max())  # 10: shows no line
        assert 2 <= lines <= rows - 1
        kinds = [kind for row in batch.asked for kind, _, _ in row]
        assert sum(kind in ("which line", "page presence") for kind in kinds) > len(kinds) / 2


@pytest.mark.parametrize("shape", [(48, 80), (80, 48)])
def test_orthogonalized_is_what_muon_computes_in_bfloat16(shape):
    grad, options = torch.randn(shape), ((3.4445, -4.775, 2.0315), 5, 1e-7)
    want = torch.optim._muon._zeropower_via_newtonschulz(grad, *options)
    got = train.orthogonalized(grad, *options)
    torch.testing.assert_close(got, want.float(), atol=0.02, rtol=0.0)
    assert got.square().sum() > 20


def test_weights_are_averaged_by_their_shares(tmp_path):
    for name, value in (("a", 1.0), ("b", 3.0)):
        (tmp_path / name).mkdir()
        save_file({"x": torch.full((2, 3), value).half()}, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text(name)
    average.main([str(tmp_path / "out"), f"{tmp_path / 'a'}:0.25", f"{tmp_path / 'b'}:0.75"])
    mean = load_file(tmp_path / "out" / "model.safetensors")["x"]
    assert mean.dtype == torch.float16 and (mean == 2.5).all()
    assert (tmp_path / "out" / "config.json").read_text() == "b"
    with pytest.raises(ValueError, match=r"found shares \[0.5, 0.75\]; expected numbers that sum to 1"):
        average.average([tmp_path / "a", tmp_path / "b"], [0.5, 0.75], tmp_path / "out")
    save_file({"y": torch.zeros(2, 3).half()}, tmp_path / "b" / "model.safetensors")
    with pytest.raises(ValueError, match="holds other tensors"):
        average.average([tmp_path / "a", tmp_path / "b"], [0.5, 0.5], tmp_path / "out")
