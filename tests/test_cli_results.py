# SPDX-License-Identifier: Apache-2.0
"""Results belong to what they were measured on: pictures, questions, weights; and none is lost or mislabeled."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import vtprune
from vtprune import refvlm
from vtprune.bench import variants
from vtprune.cli.arguments import chosen_methods
from vtprune.cli.main import main
from vtprune.core.certificate import Certificate

QUESTION = ["--question", "how many stars are there?"]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: Any) -> Callable[..., int]:
    """Runs a command in a folder with two pictures."""
    monkeypatch.chdir(tmp_path)
    for number in range(2):
        refvlm.scenes.scene(number).image.save(tmp_path / f"{number}.png")
    return lambda *words: main([str(word) for word in words])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with a copy of the built-in LLaVA."""
    model, processor = refvlm.load()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change(model: Path, value: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Changes a norm of a saved model."""
    file = model / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if name.endswith("model.norm.weight"))
    save_file(weights | {name: value(weights[name])}, file, metadata={"format": "pt"})


FIDELITY = ["fidelity", *QUESTION, "--methods", "uniform", "--ratios", "0.5", "--repeats", "1", "--images", "0.png"]
BENCH = ["bench", "--visual-tokens", "144", "--methods", "uniform", "--rounds", "1", "--new-tokens", "1"]
TUNE = ["tune", "--trials", "2", "--out", "t.json"]


def test_results_of_other_weights_are_not_taken_up(run: Any, model: Path, capsys: Any) -> None:
    commands = (
        [*FIDELITY, "--model", model, "--json", "f.json"],
        [*BENCH[:1], "--image", "0.png", *QUESTION, *BENCH[3:], "--model", model, "--json", "b.json"],
    )
    for command in commands:
        assert run(*command) == 0
    change(model, lambda weight: weight * 1.5)
    for command in commands:
        capsys.readouterr()
        assert run(*command) == 2
        assert "weights_hash" in capsys.readouterr().err


def test_other_pictures_and_questions_are_not_mixed_with_the_first(run: Any, capsys: Any, monkeypatch: Any) -> None:
    bench = ["bench", "--model", "embedded", "--methods", "uniform", "--rounds", "1", "--new-tokens", "1"]
    assert run(*bench, "--image", "0.png", *QUESTION, "--json", "b.json") == 0
    for other in (["--image", "1.png", *QUESTION], ["--image", "0.png", "--question", "how many things?"]):
        assert run(*bench, *other, "--json", "b.json") == 2
        assert "inputs_sha256" in capsys.readouterr().err
    with open("1.png", "rb") as file:
        monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=file, isatty=lambda: False))
        assert run(*bench, "--image", "-", *QUESTION, "--json", "s.json") == 0  # is read once
    pytest.importorskip("optuna")
    assert run(*TUNE, "--image", "0.png", *QUESTION) == 0
    capsys.readouterr()
    assert run(*TUNE, "--image", "1.png", *QUESTION, "--resume", "--trials", 3) == 2
    assert "has a search over other prompts or pictures" in capsys.readouterr().err
    assert run("tune", "--image", "0.png", *QUESTION, "--seed", "-5", "--out", "n.json") == 2
    assert "found seed=-5" in capsys.readouterr().err and not Path("n.json").exists()


@pytest.mark.parametrize("command", [FIDELITY, ["compare", "--image", "0.png", *QUESTION, "--methods", "uniform"]])
def test_a_model_that_gives_nan_is_an_error(run: Any, model: Path, capsys: Any, command: list[str]) -> None:
    change(model, lambda weight: weight * torch.nan)
    assert run(*command, "--model", model, "--json", "n.json") == 2
    assert "the model's logits are NaN" in capsys.readouterr().err
    with pytest.raises(vtprune.VTPruneError, match="NaN"):
        loaded, processor = refvlm.load()
        loaded.model.language_model.norm.weight.data.fill_(torch.nan)
        inputs = processor(images=refvlm.scenes.scene(0).image, text=refvlm.prompt("?"), return_tensors="pt")
        vtprune.certify(loaded, [dict(inputs)], candidates=(0.5,))


def test_a_certificate_holds_for_what_it_was_made_with(run: Any, capsys: Any) -> None:
    model, processor = refvlm.load()
    inputs = processor(images=refvlm.scenes.scene(0).image, text=refvlm.prompt("?"), return_tensors="pt")
    found = vtprune.certify(
        model, [dict(inputs)], method="pyramiddrop", candidates=(0.9,), risk=0.9, confidence=0.5, max_new_tokens=4
    )
    for options in ({"tower": 0.5}, {"window": 50}):
        with pytest.raises(vtprune.CertificateError, match=f"says nothing about {next(iter(options))}"):
            vtprune.patch(model, ratio=found, **options)
        patch = vtprune.patch(model, ratio=0.9, method="pyramiddrop", **options)  # type: ignore[arg-type]
        with patch, pytest.raises(vtprune.CertificateError, match="says nothing about"), patch.using(ratio=found):
            pass
    found.save("c.json")
    assert Certificate.load("c.json").make_method() == vtprune.methods.PyramidDrop()
    demo = ["demo", "--small", "--repeats", "1", "--certificate", "c.json"]
    assert run(*demo, "--json", "d.json") == 0
    capsys.readouterr()
    assert run(*demo, "--max-new-tokens", "5") == 2
    assert "answers of at most 4 tokens" in capsys.readouterr().err


def test_the_built_in_demo_with_a_certificate_does_not_cut_the_tower(monkeypatch: Any) -> None:
    from vtprune.cli import answer

    asked: list[Any] = []
    monkeypatch.setattr(answer, "_side_by_side", lambda args, image, truth: asked.append(args.tower))
    assert main(["demo"]) == 0 and main(["demo", "--certificate", "c.json"]) == 0
    assert asked == [answer.DEMO_TOWER, None]


def test_strategies_of_one_name_are_told_apart(run: Any) -> None:
    for folder in ("a", "b"):
        os.mkdir(folder)
        vtprune.methods.VFlowOpt().save(f"{folder}/s.json")
    vtprune.methods.VFlowOpt().save("other.json")
    assert list(chosen_methods(["a/s.json", "b/s.json", "b/../other.json"])) == ["a/s.json", "b/s.json", "other.json"]


def test_an_answer_is_not_lost_with_its_picture(run: Any, capsys: Any) -> None:
    from PIL import Image

    board = Image.new("L", (900, 900))
    board.putdata([255 * ((x + y) % 2) for y in range(900) for x in range(900)])
    board.save("board.png")
    assert run("run", "--model", "embedded", "--image", "board.png", *QUESTION, "--repeats", 1, "--json", "o.json") == 0
    assert "no picture was written" in capsys.readouterr().out and "pruned" in json.loads(Path("o.json").read_text())


def test_options_of_methods_are_parsed_everywhere(run: Any, capsys: Any) -> None:
    (method,) = chosen_methods(["vflowopt:later=(0.5,0.5),first=0.5"]).values()
    assert method.later == (0.5, 0.5) and method.first == 0.5
    assert variants._split("a=((1,2),(3,4)),b=[1,2]") == ["a=((1,2),(3,4))", "b=[1,2]"]
    demo = ["demo", "--small", "--repeats", 1]
    assert run(*demo, "--method", "fastv:layer=1") == 0
    for words, message in (
        ((*demo, "--method", "fastv:layer=1,layer=2"), "layer is given twice"),
        ((*demo, "--output", "k.h5"), "expected a file name that ends in .png or .jpg"),
        (("bench", "--model", "embedded", "--attention", "nosuch"), "has its own attention and prompts"),
        (("bench", "--model", "tiny", "--attention", "nosuch"), "cannot build the model with attention 'nosuch'"),
        (("doctor", "--dtype", "nosuch"), "add --time"),
        (("compare", "--image", "0.png", *QUESTION, "--device", "meta"), "cannot use the device 'meta'"),
        (("compare", "--image", "0.png", *QUESTION, "--model", ""), "the name of the model is empty"),
        (("compare", "--image", "0.png", "--question", "\udcff"), "not valid UTF-8"),
    ):
        capsys.readouterr()
        assert run(*words) == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("columns", ["0", "-3", "abc", "1", "40"])
def test_tables_are_shown_whatever_columns_says(run: Any, capsys: Any, monkeypatch: Any, columns: str) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert run("compare", "--image", "0.png", *QUESTION, "--methods", "uniform", "--repeats", 1) == 0
    assert "uniform" in capsys.readouterr().out


def test_copies_of_a_picture_and_repeated_questions_are_no_further_evidence(run: Any, tmp_path: Path) -> None:
    os.mkdir("copies")
    for number in range(3):
        refvlm.scenes.scene(0).image.save(f"copies/{number}.png")
    Path("questions.txt").write_text("how many stars are there?\n\nhow many stars are there?\n")
    certify = ["certify", "--images", "copies", "--questions", "questions.txt", "--ratios", "0.9", "--out", "c.json"]
    assert run(*certify, "--method", "uniform", "--max-new-tokens", 2, "--risk", 0.5) == 0
    found = Certificate.load("c.json")
    assert (found.pictures, found.questions) == (1, 3)


def test_names_of_files_may_be_any_bytes(run: Any) -> None:
    os.mkdir("bytes")
    refvlm.scenes.scene(0).image.save("bytes/a.png")
    try:
        os.rename("bytes/a.png", b"bytes/\xff.png")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    words = ["fidelity", *QUESTION, "--methods", "uniform", "--ratios", "0.5", "0.50000001", "--repeats", "1"]
    assert run(*words, "--images", "bytes", "--json", "n.json") == 0
    assert json.loads(Path("n.json").read_text())["ratios"] == [0.50000001]
