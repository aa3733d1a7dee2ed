# SPDX-License-Identifier: Apache-2.0
"""The built-in model and its test pictures."""

from __future__ import annotations

import hashlib
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

import vtprune
from vtprune import refvlm
from vtprune.refvlm import evaluate, scenes


@pytest.fixture(scope="module")
def loaded():
    return refvlm.load()


@pytest.fixture(scope="module")
def drawn():
    return [scenes.scene(seed) for seed in range(40)]


def digest(scene: scenes.Scene) -> str:
    return hashlib.sha256(scene.image.tobytes()).hexdigest()


def test_same_seed_same_scene(drawn):
    for scene in drawn[:5]:
        again = scenes.scene(scene.seed)
        assert again.objects == scene.objects and again.questions == scene.questions
        assert digest(again) == digest(scene)


def test_held_out_scenes_are_no_training_scenes(drawn):
    training = {digest(scenes.scene(scenes.TRAIN_SEEDS + number)) for number in range(40)}
    assert len(training | {digest(scene) for scene in drawn}) == 80


def test_patches_cover_the_object_and_nothing_else(drawn):
    cell = scenes.CELL
    for scene in drawn:
        picture = np.asarray(scene.image).astype(int)
        for thing in scene.objects:
            row, column = divmod(thing.patches[0], scenes.GRID)
            assert (row, column) == (thing.y // cell, thing.x // cell)
            for patch in thing.patches:
                row, column = divmod(patch, scenes.GRID)
                square = picture[row * cell : (row + 1) * cell, column * cell : (column + 1) * cell]
                near = np.abs(square - np.array(thing.rgb)).sum(-1) < 12
                # Signs are partly covered by their digit; every other object fills a fifth of each of its patches.
                assert near.mean() > 0.15 or thing.digit or patch == thing.patches[0]


def test_questions_are_answered_by_their_patches(drawn):
    for scene in drawn:
        owner = {patch: thing for thing in scene.objects for patch in thing.patches}
        assert len({question.kind for question in scene.questions}) == len(scene.questions) >= 3
        for question in scene.questions:
            assert question.patches and len(set(question.patches)) == len(question.patches)
            shown = [owner[patch] for patch in question.patches]
            if question.kind in ("color", "shape", "size", "digit"):
                assert {getattr(thing, question.kind) for thing in shown} == {question.answer}
            elif question.kind == "position":
                assert {f"{thing.vertical} {thing.horizontal}" for thing in shown} == {question.answer}
            elif question.kind == "count" and question.answer != "zero":
                assert len({id(thing) for thing in shown}) == scenes.NUMBERS.index(question.answer)


def test_answers_cannot_be_guessed():
    samples = list(evaluate.held_out_scenes(500, questions_per_scene=7))
    rows = evaluate.tally(samples, [""] * len(samples))
    assert set(rows) == {"all", *scenes.KINDS}
    assert rows["presence"]["majority"] < 0.56 and rows["size"]["majority"] < 0.58
    assert rows["all"]["majority"] < 0.36


def test_held_out_kinds_take_turns():
    samples = list(evaluate.held_out_scenes(140))
    counts = [sum(sample.kind == kind for sample in samples) for kind in scenes.KINDS]
    assert len(samples) == 140 and min(counts) >= 18


def test_ask_is_unambiguous(drawn):
    rng = random.Random(0)
    for scene in drawn:
        for _ in range(5):
            question = scenes.ask(scene.objects, "color", rng)
            assert question is None or len({t for t in scene.objects if set(t.patches) & set(question.patches)}) == 1


def test_model_is_small_and_grouped(loaded):
    model, _ = loaded
    text = model.config.text_config
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    assert text.num_hidden_layers >= 6 and text.num_key_value_heads < text.num_attention_heads
    assert next(model.parameters()).dtype == torch.float32 and not model.training
    assert sum(file.stat().st_size for file in refvlm.WEIGHTS.iterdir()) <= 10_000_000


def test_load_takes_a_dtype():
    model, _ = refvlm.load(torch.bfloat16)
    assert next(model.parameters()).dtype == torch.bfloat16
    with pytest.raises(vtprune.VTPruneError, match="name='qwen2_5_vl'"):
        refvlm.load("qwen2_5_vl")


def test_processor_expands_the_picture(loaded, drawn):
    model, processor = loaded
    image = drawn[0].image.resize((500, 200))
    inputs = processor(images=image, text=refvlm.prompt("where is the Zebra?"), return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == refvlm.VISUAL_TOKENS == 144
    assert inputs["pixel_values"].shape == (1, 3, 144, 144)
    assert processor.tokenizer.unk_token_id in inputs["input_ids"]


def test_chat_template_is_the_training_prompt(loaded):
    _, processor = loaded
    content = [{"type": "text", "text": "is there a star?"}, {"type": "image"}]
    chat = [{"role": "user", "content": content}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    assert text == refvlm.prompt("is there a star?")


def test_it_sees(loaded):
    samples = list(evaluate.held_out_scenes(70))
    answers = evaluate.answer(*loaded, samples, batch_size=35)
    right = sum(given == sample.answer for given, sample in zip(answers, samples, strict=True))
    assert right / len(samples) >= 0.85


def test_batches_change_nothing(loaded):
    samples = list(evaluate.held_out_scenes(6))
    assert evaluate.answer(*loaded, samples, batch_size=6) == evaluate.answer(*loaded, samples, batch_size=1)


def test_it_answers_easy_vqa(loaded):
    pytest.importorskip("easy_vqa")
    samples = list(evaluate.easy_vqa_test(limit=60))
    answers = evaluate.answer(*loaded, samples, batch_size=30)
    assert sum(given == sample.answer for given, sample in zip(answers, samples, strict=True)) >= 54


def test_import_is_cheap():
    code = "import sys, vtprune.refvlm; sys.exit('transformers' in sys.modules or 'tools.refvlm.train' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_load_needs_no_training_code():
    code = (
        "import sys, vtprune.refvlm as r; r.load(); "
        "sys.exit(any(name.split('.')[0] == 'tools' for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
