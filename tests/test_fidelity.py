# SPDX-License-Identifier: Apache-2.0
"""`vtprune fidelity`: its numbers, compared with direct computation, and the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, LAYERS, Image
from support import model_of

import vtprune
from vtprune import methods, refvlm
from vtprune.cli.main import main
from vtprune.models import attention_probe
from vtprune.refvlm import loading
from vtprune.study import charts, fidelity, intervals, metrics
from vtprune.study.fidelity import Prompt, Variant, measure_prompt, summarize, with_resizing
from vtprune.study.resize import shrinking

PROMPT = [[3, Image(0), 4]]
ONCE = {"max_new_tokens": 3, "repeats": 1}


@pytest.fixture(scope="module")
def embedded() -> tuple[Any, Any]:
    return refvlm.load()


def prompt_of(family: str) -> Prompt:
    return Prompt(FAMILIES[family].batch(PROMPT), "a")


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_keeping_all_tokens_changes_nothing(family: str) -> None:
    variants = [Variant(name, methods.get(name)(), 1.0) for name in ("random", "iwp", "pyramiddrop", "pooling")]
    records = measure_prompt(model_of(family), prompt_of(family), variants, **ONCE)
    assert records.pop("unpruned")["seconds"] > 0
    for key, record in records.items():
        numbers = {name: record[name] for name in ("kl", "top1", "answers", "prefix")}
        assert numbers == {"kl": 0, "top1": 1, "answers": 1, "prefix": 1}, key
        assert record["cosine"] == pytest.approx(1, abs=1e-12) and set(record["attention_errors"]) == {0.0}
        assert record["kept"] == record["visual"] and record["mean_ratio"] == 1 and record["seconds"] > 0
    assert len(records["pyramiddrop 1"]["attention_errors"]) > 1


def test_fewer_tokens_are_worse_on_the_embedded_model(embedded: tuple[Any, Any]) -> None:
    model, processor = embedded
    variants = [Variant("random", methods.Random(), ratio) for ratio in (0.5, 0.05)]
    records = []
    for number in range(6):
        scene = refvlm.scenes.scene(number)
        text = refvlm.prompt(scene.questions[0].text)
        inputs = processor(images=scene.image, text=text, return_tensors="pt")
        records.append(measure_prompt(model, Prompt(inputs, number), variants, turn=number, **ONCE))
    many, few = summarize(records, range(6), variants)
    for name, worse in (("kl", 1), ("attention_error", 1), ("cosine", -1), ("answers", -1)):
        assert worse * few[name]["value"] > worse * many[name]["value"], name
    assert (many["kept"], few["kept"]) == (72, 7)


@torch.no_grad()
@pytest.mark.parametrize("method", [methods.DivPrune(), methods.FastV(layer=2), methods.IWP(layer=1)])
def test_attention_error_is_the_directly_computed_one(method: methods.Method) -> None:
    """The attention error equals that of a softmax written out, with and without the dropped columns."""
    model, prompt = model_of("llava"), prompt_of("llava")
    layer = next(iter(method.schedule(LAYERS))).layer
    record = measure_prompt(model, prompt, [Variant("it", method, 0.2)], **ONCE)["it 0.2"]
    with vtprune.patch(model, ratio=0.2, method=method) as patch:
        model(**prompt.inputs)
        visual, kept = patch.last.visual[0], patch.last.kept[0]
    taken: list[tuple] = []
    module = vtprune.inspect(model).layers[layer]
    handle = module.register_forward_pre_hook(lambda m, args, kwargs: taken.append((args, kwargs)), with_kwargs=True)
    model(**prompt.inputs)
    handle.remove()
    attention_probe.install()
    read = attention_probe.probe(module, *taken[0])
    attention_probe.uninstall()
    heads = read.query.shape[1] // read.key.shape[1]
    key, value = (x.repeat_interleave(heads, 1).double() for x in (read.key, read.value))
    length = key.shape[2]
    logits = read.query.double() @ key.transpose(2, 3) * read.scaling
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    dropped = torch.zeros(length, dtype=torch.bool)
    dropped[visual[~torch.isin(visual, kept)]] = True
    text = slice(int(visual.max()) + 1, length)
    full, less = (
        (logits.masked_fill(~seen, -torch.inf).softmax(-1) @ value)[:, :, text] for seen in (causal, causal & ~dropped)
    )
    want = float((less - full).norm() / full.norm())
    assert want > 0.01 and dropped.any() and text.stop - text.start == 4
    assert record["attention_errors"] == [pytest.approx(want, rel=1e-4)]


def test_prompts_are_read_as_the_single_functions_read_them() -> None:
    model, inputs = model_of("llava"), prompt_of("llava").inputs
    for ratio in (1.0, 0.3):
        with vtprune.patch(model, ratio=ratio, method="uniform"):
            reading = metrics.capture(model, inputs, rows=2)
            torch.testing.assert_close(reading.logits, metrics.next_token_logits(model, inputs))
            torch.testing.assert_close(reading.state, metrics.last_states(model, inputs))
        assert set(reading.attention) == set(range(LAYERS)) and reading.attention[0].shape[:2] == (1, 2)
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in vtprune.inspect(model).layers)


def test_answers_are_compared_up_to_their_first_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    given = iter([[5, 6, 7, 8], [5, 6, 9], [5, 6, 7, 8]])
    monkeypatch.setattr(fidelity, "_answer", lambda *args: next(given))
    variants = [Variant("a", methods.Random(), 0.5), Variant("b", methods.Uniform(), 0.5)]
    records = measure_prompt(model_of("llava"), prompt_of("llava"), variants, **ONCE)
    assert (records["a 0.5"]["answers"], records["a 0.5"]["prefix"]) == (0, 0.5)
    assert (records["b 0.5"]["answers"], records["b 0.5"]["prefix"]) == (1, 1)


def test_a_method_that_cannot_be_run_is_a_row_with_the_reason() -> None:
    variants = [Variant("compact", methods.DivPrune(positions="compact"), 0.5), Variant("fine", methods.Random(), 0.5)]
    record = measure_prompt(model_of("qwen2_5_vl"), prompt_of("qwen2_5_vl"), variants, **ONCE)
    rows = summarize([record], ["a"], variants)
    assert "one axis" in rows[0]["refused"] and "refused" not in rows[1]


def test_prompts_without_pictures_and_patched_models_are_refused() -> None:
    model = model_of("llava")
    with pytest.raises(vtprune.VTPruneError, match="no visual token"):
        measure_prompt(model, Prompt(FAMILIES["llava"].batch([[5, 6]]), "a"), [], **ONCE)
    with pytest.raises(vtprune.VTPruneError, match="a prompt has 2 samples; expected batches of one"):
        measure_prompt(model, Prompt(FAMILIES["llava"].batch([[3, Image(0), 5], [6, Image(1), 2]]), "a"), [], **ONCE)
    with vtprune.patch(model, ratio=0.5), pytest.raises(vtprune.VTPruneError, match="remove the patch"):
        measure_prompt(model, prompt_of("llava"), [], **ONCE)


def fake(seconds: float, kl: float, same: float, error: float | None = 0.5) -> dict[str, Any]:
    numbers = {"kl": kl, "top1": same, "answers": same, "prefix": same, "cosine": 0.9, "attention_errors": [0.1, error]}
    return numbers | {"seconds": seconds, "selection_seconds": 0.01, "visual": 100, "kept": 10, "mean_ratio": 0.1}


def test_rows_sum_prompts_up_picture_by_picture() -> None:
    variants = [Variant(name, methods.Random(), 0.1) for name in ("near", "far", "slow")]
    unpruned = {"seconds": 2.0}
    first = {"near 0.1": fake(1, 0.1, 1), "far 0.1": fake(1, 0.4, 0), "slow 0.1": fake(3, 0.01, 1)}
    second = {"near 0.1": fake(1, 0.3, 0), "far 0.1": fake(1, 0.4, 1), "slow 0.1": fake(3, 0.01, 1)}
    third = {"near 0.1": fake(1, 0.9, 1), "far 0.1": fake(1, 0.8, 1), "slow 0.1": fake(3, 0.01, 1, None)}
    records = [{"unpruned": unpruned, **record} for record in (first, second, third)]
    near, far, slow = summarize(records, ["a", "a", "b"], variants)
    # the two prompts about picture a count as one observation
    assert near["kl"]["value"] == pytest.approx((0.2 + 0.9) / 2) and near["kl"]["interval"] == [0.2, 0.9]
    assert near["top1"]["value"] == 0.75
    assert near["top1"]["interval"] == [pytest.approx(x, rel=1e-5) for x in intervals.wilson(1.5, 2)]
    assert near["relative_time"] == {"value": 0.5, "interval": [0.5, 0.5]} and near["cuts_error"] == [0.1, 0.5]
    # the lower KL of two equally fast methods is on the frontier; one slower than the unpruned model never is
    assert (near["frontier"], far["frontier"], slow["frontier"]) == (True, False, False)
    assert near["attention_error"]["value"] == 0.5 and "attention_error" not in slow
    alone = summarize(records[:2], ["a", "a"], variants)[0]  # one picture gives no bootstrap interval
    assert alone["kl"] == {"value": 0.2, "interval": None} and alone["top1"]["interval"] is not None


def test_smaller_pictures_are_rows_and_methods_keep_as_many_tokens() -> None:
    model, processor = refvlm.load(name="qwen2_5_vl")
    image = refvlm.scenes.scene(3).small
    variants = with_resizing([Variant("random", methods.Random(), 0.3)])
    assert [v.key for v in variants] == ["random 0.3", "resize 0.9", "resize 0.75", "resize 0.3"]

    def made(picture: Any) -> Any:
        return loading.inputs(model, processor, picture, "what?")

    prompt = Prompt(made(image), "a", shrinking(model, processor, image, made))
    records = measure_prompt(model, prompt, variants, **ONCE)
    counts = {key: records[key]["kept"] for key in records if key != "unpruned"}
    assert counts == {"random 0.3": 36, "resize 0.9": 121, "resize 0.75": 100, "resize 0.3": 36}
    small, _ = shrinking(model, processor, image, made)(43)
    want = metrics.divergence(metrics.next_token_logits(model, prompt.inputs), metrics.next_token_logits(model, small))
    assert records["resize 0.3"]["kl"] == pytest.approx(float(want), rel=1e-4)


def test_rows_beside_smaller_pictures_at_equal_tokens_and_at_no_more_time() -> None:
    variants = [Variant("mine", methods.Random(), 0.1), Variant("resize", None, 0.5), Variant("resize", None, 0.1)]

    def record(mine: float, half: float, tenth: float) -> dict[str, Any]:
        rows = {"mine 0.1": fake(1.2, 0.3, mine), "resize 0.5": fake(1.1, 0.1, half)}
        return {"unpruned": {"seconds": 2.0}, **rows, "resize 0.1": fake(0.4, 0.9, tenth)}

    records = [record(1, 1, 0), record(0, 1, 0), record(1, 0, 0), record(0, 0, 1)]
    mine, half, tenth = summarize(records, list("abcd"), variants)
    nearer, further = ({"value": x, "interval": [x, x]} for x in (-0.6, 0.2))
    assert mine["equal_tokens"] == {"ratio": 0.1, "kl": nearer, "changed": 3, "kept": 2}
    assert mine["equal_time"] == {"ratio": 0.5, "kl": further, "changed": 2, "kept": 1}
    assert half["equal_time"] is None and tenth["equal_tokens"] is None


def test_intervals_are_the_known_ones() -> None:
    assert intervals.wilson(95, 100) == pytest.approx((0.8882, 0.9785), abs=1e-4)
    assert intervals.wilson(3, 3)[0] < 0.5 and intervals.wilson(0, 0) == (0, 1)
    values = np.random.default_rng(1).normal(3, 2, 400)
    low, high = intervals.bootstrap(values)
    error = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - error, values.mean() + error), abs=0.03)
    assert intervals.bootstrap(values) == (low, high) and intervals.bootstrap([4.0]) == (4.0, 4.0)


@pytest.fixture
def command(embedded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Runs the command on the built-in model, loaded once, with small settings."""
    monkeypatch.setattr(loading, "model_and_processor", lambda *args: embedded)

    def run(*arguments: Any) -> int:
        given = ["fidelity", "--repeats", "1", "--max-new-tokens", "4", "--methods", "random", "iwp"]
        return main([*given, "--json", str(tmp_path / "out.json"), *map(str, arguments)])

    return run


def test_the_command_shows_and_writes_what_it_measured(
    command: Any, capfd: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    assert command("--limit", 2, "--ratios", 1, 0.1) == 0
    out = capfd.readouterr().out
    assert "2 pictures (drawn scenes), 2 prompts" in out and "144 of 144" in out and "14 of 144" in out
    data = json.loads((tmp_path / "out.json").read_text())
    assert [(row["method"], row["ratio"]) for row in data["rows"]] == [
        *((method, ratio) for method in ("random", "iwp") for ratio in (1, 0.1)),
        *(("resize", ratio) for ratio in (1, 0.9, 0.75, 0.1)),
    ]
    refused = [row["ratio"] for row in data["rows"] if "refused" in row]
    assert refused == [0.9, 0.75, 0.1] and out.count("resizing cannot reach") == 1, "its grid is fixed"
    assert data["rows"][0]["kl"] == {"value": 0, "interval": [0, 0]} and data["rows"][1]["kl"]["value"] > 0
    assert data["questions"] == "the scenes' own" and "records" not in data
    assert not charts.available() or "iwp" in (tmp_path / "out.svg").read_text()
    monkeypatch.setenv("COLUMNS", "30")
    assert command("--limit", 2, "--ratios", 1, 0.1) == 0  # nothing is measured again
    assert json.loads((tmp_path / "out.json").read_text()) == data
    out = capfd.readouterr().out  # a table that does not fit is a list
    assert "random\n  kept: 14 of 144\n" in out and "…" not in out


def test_clips_are_measured_beside_smaller_frames(monkeypatch: Any, tmp_path: Path, capfd: Any) -> None:
    loaded = refvlm.load(name="qwen2_5_vl")
    monkeypatch.setattr(loading, "model_and_processor", lambda *args: loaded)
    given = ["fidelity", "--clip", "--model", "embedded-qwen2_5_vl", "--repeats", "1", "--max-new-tokens", "2"]
    given += ["--methods", "vidcom2", "--ratios", "0.3", "--limit", "2"]
    assert main([*given, "--json", str(tmp_path / "drawn.json")]) == 0
    assert "drawn clips" in capfd.readouterr().out
    data = json.loads((tmp_path / "drawn.json").read_text())
    assert data["questions"] == "the clips' own" and data["pictures"] == 2
    counts = {f"{row['method']} {row['ratio']}": row["kept"] for row in data["rows"]}
    assert data["rows"][0]["kept"] == counts["resize 0.3"] <= 0.3 * data["rows"][0]["visual"] < counts["resize 0.9"]
    assert data["rows"][0]["equal_tokens"]["ratio"] == 0.3

    for name in ("one", "two"):
        (tmp_path / "films" / name).mkdir(parents=True)
        for number in range(4):
            refvlm.scenes.scene(number // 2).small.save(tmp_path / "films" / name / f"{number}.png")
    films = ["--images", str(tmp_path / "films"), "--question", "what?"]
    assert main([*given, *films, "--json", str(tmp_path / "films.json")]) == 0
    data = json.loads((tmp_path / "films.json").read_text())
    assert (data["pictures"], data["of"], data["rows"][0]["visual"]) == (2, "films", 288)
    (tmp_path / "films" / "one" / "0.png").unlink()
    assert main([*given, *films, "--json", str(tmp_path / "odd.json")]) == 2
    assert "expected an even number of frames" in capfd.readouterr().err


def test_the_command_takes_a_folder_and_questions_and_goes_on(
    command: Any, capfd: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(2):
        refvlm.scenes.scene(number).image.save(pictures / f"{number}.png")
    (tmp_path / "asked.txt").write_text("how many stars?\n\nwhat color is the circle?\n")
    arguments = ["--images", pictures, "--questions", tmp_path / "asked.txt", "--ratios", 0.1]
    measured, measure = [], fidelity.measure_prompt

    def interrupted(model: Any, prompt: Prompt, *args: Any, **kwargs: Any) -> Any:
        if len(measured) == 3:
            measured.append("stop")
            raise KeyboardInterrupt
        measured.append(prompt.picture)
        return measure(model, prompt, *args, **kwargs)

    monkeypatch.setattr(fidelity, "measure_prompt", interrupted)
    with pytest.raises(SystemExit) as stopped:
        command(*arguments)
    assert stopped.value.code == 130 and len(json.loads((tmp_path / "out.json").read_text())["records"]) == 3
    assert command(*arguments) == 0
    assert measured == ["0.png", "0.png", "1.png", "stop", "1.png"]
    data = json.loads((tmp_path / "out.json").read_text())
    assert (data["pictures"], data["prompts"]) == (2, 4) and data["of"] == "pictures"
    capfd.readouterr()
    assert command(*arguments, "--max-new-tokens", 5) == 2
    line = capfd.readouterr().err.strip()
    assert len(line.splitlines()) == 1 and "max_new_tokens" in line and "--force" in line
    assert json.loads((tmp_path / "out.json").read_text()) == data


def test_the_command_refuses_in_one_line(command: Any, capfd: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_text("no picture")
    (tmp_path / "blank.txt").write_text("\n")
    for arguments, message in (
        (["--images", tmp_path / "none"], "expected a file, or a folder"),
        (["--images", tmp_path / "empty"], "no picture in the folder"),
        (["--images", tmp_path / "broken"], "as a picture"),
        (["--questions", tmp_path / "blank.txt"], "has no question"),
        (["--questions", tmp_path / "none.txt"], "as questions"),
        (["--methods", "fastvv"], "did you mean 'fastv'"),
        (["--ratios", "0"], "(0, 1]"),
        (["--json", tmp_path / "none" / "a.json"], "folder does not exist"),
        (["--plot", tmp_path / "a.txt"], ".svg, .png or .pdf"),
        (["--model", tmp_path], "config.json"),
    ):
        assert command(*arguments) == 2
        out, err = capfd.readouterr()
        assert out == "" and len(err.strip().splitlines()) == 1 and message in err, arguments
