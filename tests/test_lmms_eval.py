# SPDX-License-Identifier: Apache-2.0
"""The lmms-eval plug-in. Tests that need lmms-eval are skipped where it is not installed (`make eval` installs it)."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest
from PIL import Image

from benchmarks import lmms as bench
from vtprune import BudgetError, MethodError, methods, refvlm
from vtprune.errors import InputError
from vtprune.integrations.lmms_eval import options
from vtprune.integrations.lmms_eval.pictures import square
from vtprune.methods.vflowopt.method import VFlowOpt
from vtprune.refvlm import evaluate
from vtprune.study import progress

needs_lmms_eval = pytest.mark.skipif(
    importlib.util.find_spec("lmms_eval") is None,
    reason="lmms-eval is not installed; `make eval` sets up an environment with it and runs this file there",
)
SCENES, BATCH = 6, 4


def test_options_of_the_method_are_read_as_lmms_eval_hands_them_over():
    iwp = options.method("iwp", {"layer": 2}, ())
    assert isinstance(iwp, methods.get("iwp")) and iwp.layer == 2
    hosted = options.method("debiased", {"host": "pyramiddrop"}, ())
    assert isinstance(hosted.host, methods.get("pyramiddrop"))
    assert options.method("pyramiddrop", {"layers": "[8, 16]"}, ()).layers == (8, 16)
    assert options.method("none", {}, ()) is None


def test_a_tuned_strategy_is_read_from_its_file(tmp_path):
    stored = VFlowOpt(preset=0.1)
    stored.save(tmp_path / "strategy.json")
    assert options.method(str(tmp_path / "strategy.json"), {"recycle": False}, ()).later == stored.later
    with pytest.raises(MethodError):
        options.method(str(tmp_path / "none.json"), {}, ())


def test_wrong_arguments_are_refused_by_name():
    with pytest.raises(options.ArgumentError, match="unknown model argument layr; vtprune takes ratio.*layer"):
        options.method("iwp", {"layr": 2}, ("ratio",))
    with pytest.raises(options.ArgumentError, match="not a JSON list"):
        options.method("pyramiddrop", {"layers": "[8, 16"}, ())
    with pytest.raises(MethodError, match="did you mean 'iwp'"):
        options.method("iwpp", {}, ())
    assert options.budget("iwp", ratio=0.1, keep=None) == {"ratio": 0.1}
    assert options.budget("none", ratio=None, keep=None) == {}
    for method, given in (("iwp", {}), ("iwp", {"ratio": 0.1, "keep": 3}), ("none", {"keep": 3})):
        with pytest.raises(BudgetError):
            options.budget(method, **given)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"square": "no"}, "square is 'no'; expected True or False"),
        ({"square": 1}, "square is 1; expected True or False"),
        ({"use_cache": "no"}, "use_cache is 'no'; expected True or False"),
        ({"method": 3}, "method is 3; expected a text"),
        ({"dtype": 16}, "dtype is 16; expected a text"),
        ({"pretrained": 5}, "pretrained is 5; expected a text"),
        ({"system_prompt": 5}, "system_prompt is 5; expected a text or None"),
        ({"device": 5}, "device is 5; expected a text or None"),
    ],
)
def test_arguments_of_another_type_are_refused_with_what_was_expected(given, words):
    with pytest.raises(options.ArgumentError, match=f"^{words}$"):
        options.check(given, options.ARGUMENTS)
    options.check({"square": True, "device": None, "method": "iwp", "mine": 3}, options.ARGUMENTS)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"max_new_tokens": "4"}, "max_new_tokens is '4'; expected a whole number in .* or None"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; expected a whole number in .* or None"),
        ({"temperature": "0"}, "temperature is '0'; expected a finite number or None"),
        ({"num_beams": None}, "num_beams is None; expected a whole number in .*"),
        ({"until": 3}, "until is 3; expected .*"),
    ],
)
def test_generation_options_of_another_type_are_refused_with_what_was_expected(asked, words):
    with pytest.raises(options.ArgumentError, match=f"^{words}$"):
        options.check(asked, options.GENERATION)


@pytest.mark.parametrize(("size", "corner"), [((6, 3), (0, 1)), ((3, 6), (1, 0)), ((5, 2), (0, 1)), ((4, 4), (0, 0))])
def test_square_has_the_picture_in_the_middle_of_the_mean_color(size, corner):
    padded = square(Image.new("RGB", size, (9, 9, 9)), (0.5, 0.25, 1.0))
    side = max(size)
    assert padded.size == (side, side)
    inside = {(x, y) for x in range(side) for y in range(side) if padded.getpixel((x, y)) == (9, 9, 9)}
    assert inside == {(corner[0] + x, corner[1] + y) for x in range(size[0]) for y in range(size[1])}
    outside = {padded.getpixel((x, y)) for x in range(side) for y in range(side)} - {(9, 9, 9)}
    assert outside <= {(127, 63, 255)}


def test_committed_numbers_are_the_same_in_one_process_and_in_two():
    data = progress.load(bench.OUT, {"ratio": bench.RATIO})
    assert {row["method"] for row in data["rows"] if row["processes"] == 2} == set(bench.TWICE)
    assert bench.differences(data["rows"]) == []
    assert bench.README.read_text(encoding="utf-8") == bench.with_table(bench.README.read_text(encoding="utf-8"), data)
    changed = [row if row["processes"] == 1 else row | {"tasks": {"vtprune_scenes": {}}} for row in data["rows"]]
    assert len(bench.differences(changed)) == len(bench.TWICE)


def model(**arguments):
    """The plug-in's model as lmms-eval makes it, and a stand-in for its tasks."""
    from lmms_eval.models import get_model

    made = get_model("vtprune").create_from_arg_string(",".join(f"{k}={v}" for k, v in arguments.items()), {})
    made.task_dict = {"scenes": {"test": list(evaluate.held_out_scenes(SCENES))}}
    return made


def request(number, picture=True, task="scenes", generation=None):
    from lmms_eval.api.instance import Instance

    def messages(sample):
        shown = [{"type": "image", "url": sample.image}] if picture else []
        return [{"role": "user", "content": [*shown, {"type": "text", "text": sample.question}]}]

    asked = generation or {"max_new_tokens": 4, "temperature": 0}
    metadata = {"task": task, "doc_id": number, "repeats": 1}
    return Instance("generate_until", ("", messages, asked, number, task, "test"), 0, metadata)


def counts(results):
    return [result.token_counts.to_dict() for result in results]


@needs_lmms_eval
@pytest.mark.parametrize("method", ["none", "iwp", "divprune"])
def test_answers_are_those_of_the_library(method):
    import vtprune

    budget = {} if method == "none" else {"ratio": 0.1}
    results = model(method=method, batch_size=BATCH, **budget).generate_until([request(n) for n in range(SCENES)])
    reference, processor = refvlm.load()
    patch = vtprune.patch(reference, method=method, **budget) if budget else None
    wanted = evaluate.answer(reference, processor, list(evaluate.held_out_scenes(SCENES)), batch_size=1)
    assert [result.text.strip() for result in results] == wanted
    for count in counts(results):
        if patch is None:
            assert set(count) == {"input_tokens", "output_tokens"}
        else:
            kept = len(patch.last.kept[0])
            assert (count["visual_tokens"], count["kept_visual_tokens"]) == (refvlm.VISUAL_TOKENS, kept)
            assert count["mean_ratio"] == pytest.approx(patch.last.mean_ratio, abs=1e-6)
            assert count["stages"] == [[patch.last.stages[0][0], kept]]


@needs_lmms_eval
def test_requests_without_a_picture_alone_and_between_others():
    pruned = model(ratio=0.1, method="random", batch_size=BATCH)
    shown = [True, False, True, True, False, False]
    mixed = pruned.generate_until([request(n, picture) for n, picture in enumerate(shown)])
    assert [count["visual_tokens"] for count in counts(mixed)] == [144 * picture for picture in shown]
    assert [count["kept_visual_tokens"] for count in counts(mixed)] == [14 * picture for picture in shown]
    blind = [number for number, picture in enumerate(shown) if not picture]
    alone = pruned.generate_until([request(number, picture=False) for number in blind])
    assert [result.text for result in alone] == [mixed[number].text for number in blind]
    assert all(count["visual_tokens"] == 0 and count["stages"] == [] for count in counts(alone))


@needs_lmms_eval
def test_generation_options_are_followed_or_named(caplog):
    pruned = model(method="none")

    def answer(**generation):
        return pruned.generate_until([request(3, generation=generation)])[0]

    whole = answer(max_new_tokens=4).text
    assert len(whole) > 3 and not caplog.records
    for until in (whole[2], [None, whole[2]]):
        assert answer(max_new_tokens=4, until=until).text == whole[: whole.index(whole[2])]
    assert answer(max_gen_toks=1).token_counts.output_tokens == 1
    for _ in range(2):
        answer(max_new_tokens=1, top_k=5, image_aspect_ratio="pad")
    assert [record.message.split(";")[0] for record in caplog.records] == [
        "generation options that are not followed: image_aspect_ratio, top_k"
    ]


@needs_lmms_eval
@pytest.mark.parametrize(("kind", "part"), [("video", "video_processor"), ("audio", "feature_extractor")])
def test_clips_and_audio_that_the_processor_cannot_read_are_refused(kind, part):
    asked = request(0)
    shown = [{"role": "user", "content": [{"type": kind, "url": "a.mp4"}, {"type": "text", "text": "what?"}]}]
    asked.arguments = ("", lambda sample: shown, *asked.args[2:])
    with pytest.raises(options.ArgumentError, match=f"LlavaProcessor has no {part}"):
        model(ratio=0.1).generate_until([asked])


@needs_lmms_eval
def test_both_built_in_models_load():
    other = model(pretrained="embedded-qwen2_5_vl", ratio=0.1, method="random", batch_size=2)
    assert other.model.config.model_type == "qwen2_5_vl"
    results = other.generate_until([request(0), request(1)])
    assert all(0 < count["kept_visual_tokens"] < count["visual_tokens"] for count in counts(results))


@needs_lmms_eval
def test_tasks_may_share_a_batch_options_may_not_and_beams_keep_their_counts():
    pruned = model(ratio=0.1, method="random", batch_size=BATCH)
    pruned.task_dict["other"] = {"test": pruned.task_dict["scenes"]["test"][::-1]}
    beams = {"max_new_tokens": 1, "num_beams": 2}
    asked = [request(0), request(1, task="other"), request(2, generation=beams), request(3, False, generation=beams)]
    results = pruned.generate_until(asked)
    alone = [pruned.generate_until([one])[0] for one in asked]
    assert [result.text for result in results] == [result.text for result in alone]
    assert counts(results) == counts(alone)
    assert [count["kept_visual_tokens"] for count in counts(results)] == [14, 14, 14, 0]


def scored(number, answer, *rest):
    """A request as lmms-eval's own multiple-choice tasks make it."""
    from lmms_eval.api.instance import Instance

    metadata = {"task": "scenes", "doc_id": number, "repeats": 1}
    sample = list(evaluate.held_out_scenes(SCENES))[number]
    arguments = rest or (lambda doc: [doc.image], number, "scenes", "test")
    return Instance("loglikelihood", (sample.question if not rest else "", answer, *arguments), 0, metadata)


@needs_lmms_eval
@pytest.mark.parametrize("method", ["none", "iwp"])
def test_log_likelihoods_are_those_of_the_library(method):
    """Each answer, in a batch of different lengths, has the loss of the library with the same tokens dropped."""
    import torch

    import vtprune

    budget = {} if method == "none" else {"ratio": 0.1}
    made = model(method=method, batch_size=BATCH, **budget)
    samples = list(evaluate.held_out_scenes(SCENES))
    asked = [(n, answer) for n in (0, 1) for answer in ("red", "a red circle", samples[n].answer, "5")]
    got = made.loglikelihood([scored(n, answer) for n, answer in asked])
    reference, processor = refvlm.load()
    patch = vtprune.patch(reference, method=method, **budget) if budget else None
    kept = []
    for (number, answer), result in zip(asked, got, strict=True):
        loss, greedy = result.text
        turn = {"type": "image"}, {"type": "text", "text": samples[number].question}
        text = processor.apply_chat_template(
            [{"role": "user", "content": list(turn)}], tokenize=False, add_generation_prompt=True
        )
        prompt = processor(images=samples[number].image, text=text, return_tensors="pt")
        inputs = processor(images=samples[number].image, text=text + answer, return_tensors="pt")
        labels = inputs["input_ids"].clone()
        labels[:, : prompt["input_ids"].shape[1]] = -100
        with torch.no_grad():
            want = reference(**inputs, labels=labels)
            kept.append(patch.last.kept[0].tolist() if patch else [])
            written = reference.generate(**prompt, max_new_tokens=int((labels != -100).sum()), do_sample=False)
        assert loss == pytest.approx(float(want.loss), abs=1e-3)
        assert greedy == torch.equal(written[0], inputs["input_ids"][0])
    assert all(k == kept[0] for k in kept[:4]) and any(result.text[1] for result in got)
    assert all((result.token_counts.to_dict().get("kept_visual_tokens") == 14) == bool(budget) for result in got)


@needs_lmms_eval
def test_an_answer_without_a_question_and_an_empty_one():
    made = model(ratio=0.1, batch_size=BATCH)
    alone = made.loglikelihood([scored(0, "red", None, 0, "scenes", "test")])
    from lmms_eval.api.instance import Instance

    metadata = {"task": "scenes", "doc_id": 0, "repeats": 1}
    two = made.loglikelihood([Instance("loglikelihood", ("", "red"), 0, metadata)])
    assert two[0].text == alone[0].text and two[0].text[0] > 0
    with pytest.raises(options.ArgumentError, match="no tokens"):
        made.loglikelihood([scored(0, "")])


@needs_lmms_eval
def test_multiple_choice_by_the_command(tmp_path):
    import json
    import subprocess

    command = bench.command(bench.Job("iwp"), ["vtprune_scene_choices"], 8, 8, str(tmp_path))
    done = subprocess.run([*command, "--force_simple"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = json.loads(next(tmp_path.rglob("*_results.json")).read_text())["results"]["vtprune_scene_choices"]
    assert found["acc,none"] >= 0.75


@needs_lmms_eval
def test_square_padding_reaches_the_processor_and_the_method(monkeypatch):
    pruned = model(ratio=0.1, method="debiased", square=True, batch_size=2)
    pruned.task_dict["scenes"]["test"] = [
        sample._replace(image=sample.image.resize(size))
        for sample, size in zip(pruned.task_dict["scenes"]["test"], [(60, 30), (20, 50)], strict=False)
    ]
    seen = []
    process = pruned.processor.image_processor.preprocess
    monkeypatch.setattr(
        pruned.processor.image_processor,
        "preprocess",
        lambda images, *a, **k: seen.extend(images) or process(images, *a, **k),
    )
    pruned.generate_until([request(0), request(1)])
    assert [image.size for image in seen] == [(60, 60), (50, 50)]
    assert pruned.patch.method.sizes == [(30, 60), (50, 20)]


@needs_lmms_eval
def test_folders_device_maps_and_a_clean_end(tmp_path, monkeypatch):
    from transformers import AutoModelForImageTextToText

    load, asked_for = AutoModelForImageTextToText.from_pretrained, {}
    monkeypatch.setattr(
        AutoModelForImageTextToText, "from_pretrained", lambda *a, **k: asked_for.update(k) or load(*a, **k)
    )
    stored, processor = refvlm.load()
    stored.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    spread = model(pretrained=tmp_path, ratio=0.1, device_map="auto", dtype="float32", attn_implementation="eager")
    assert asked_for["device_map"] == "auto" and spread.model.config._attn_implementation == "eager"
    asked = [request(0), request(1)]
    answers = [result.text for result in spread.generate_until(asked)]
    assert answers == [result.text for result in model(ratio=0.1).generate_until(asked)]
    patch = spread.patch
    spread.clean()
    assert patch.removed and spread.patch is None and not hasattr(spread, "_model")


@needs_lmms_eval
def test_what_cannot_be_run_is_refused(monkeypatch):
    from accelerate import DistributedType

    from vtprune.integrations.lmms_eval import model as module

    for wrong in ({"batch_size": 0}, {"square": True, "squeeze": 1}, {"square": "no"}, {"method": 3}):
        with pytest.raises(options.ArgumentError):
            model(ratio=0.1, **wrong)
    for wrong, words in (({"dtype": "int8"}, "unknown dtype 'int8'"), ({"device": "gpu9"}, "cannot use the device")):
        with pytest.raises(InputError, match=words):
            model(ratio=0.1, **wrong)
    for kind, extra in ((DistributedType.MULTI_CPU, {"device_map": "auto"}), (DistributedType.FSDP, {})):
        state = SimpleNamespace(distributed_type=kind, num_processes=2, process_index=0, device="cpu")
        monkeypatch.setattr(module, "Accelerator", lambda state=state: state)
        with pytest.raises(options.ArgumentError, match="processes"):
            model(ratio=0.1, **extra)


@needs_lmms_eval
def test_the_command_gives_the_same_numbers_in_one_process_and_in_two():
    rows = [bench.run(bench.Job("iwp", processes), limit=7, batch=2) for processes in (1, 2)]
    assert bench.differences(rows) == []
    scenes = rows[0]["tasks"]["vtprune_scenes"]
    assert (scenes["total"], scenes["visual_tokens"], scenes["kept_visual_tokens"]) == (7, 144, 14)
    assert rows[0]["tasks"]["vtprune_scenes_without_picture"]["visual_tokens"] == 0


@needs_lmms_eval
def test_every_task_named_in_the_reproduction_commands_exists():
    import re

    from lmms_eval.tasks import TaskManager

    text = bench.README.read_text(encoding="utf-8")
    named = {task for group in re.findall(r"(?:--tasks |TASKS=)([\w,]+)", text) for task in group.split(",")}
    known = set(TaskManager("ERROR", include_path=str(bench.TASKS_FOLDER)).all_tasks)
    assert len(named) >= 10 and named <= known
