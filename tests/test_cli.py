# SPDX-License-Identifier: Apache-2.0
"""The command `vtprune`: its output and files, and one-line errors for invalid input."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from PIL import Image

from vtprune import refvlm
from vtprune.cli.main import main
from vtprune.study.stopwatch import cache_bytes


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "photo.png"
    refvlm.scenes.scene(3).image.save(path)
    return path


def _run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def _refused(capfd, *arguments: object) -> str:
    """Runs a command that must be refused, and returns its one line."""
    assert _run(*arguments) == 2
    out, err = capfd.readouterr()
    assert out == ""
    lines = err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("vtprune: error: "), err
    assert "Traceback" not in err
    return lines[0]


def _numbers(output: str, row: str) -> list[float]:
    """The two numbers in a row of the table."""
    line = next(line for line in output.splitlines() if row in line)
    return [float(cell.replace(",", "")) for cell in re.findall(r"│\s*([\d.,]+)", line)]


def test_run_compares_both_ways_and_writes_the_picture(capfd, tmp_path, folder, photo):
    picture = tmp_path / "out.png"
    arguments = ["--image", photo, "--question", "how many stars?", "--method", "uniform", "--output", picture]
    assert _run("run", "--model", folder, *arguments, "--ratio", 0.1, "--repeats", 1, "--max-new-tokens", 3) == 0
    out = capfd.readouterr().out
    assert _numbers(out, "visual tokens") == [144, 14]
    before, after = _numbers(out, "prompt tokens")
    assert before - after == 130
    # 6 layers, 2 key-value heads of 32 numbers, keys and values, float32
    assert _numbers(out, "KV cache") == [tokens * 6 * 2 * 32 * 2 * 4 for tokens in (before, after)]
    assert all(0 < seconds < 30 for seconds in _numbers(out, "time to first token"))
    nothing, selecting = _numbers(out, "of which selection")
    assert nothing == 0 < selecting < _numbers(out, "time to first token")[1]
    left, right = np.split(np.asarray(Image.open(picture).convert("L"), dtype=float), 2, axis=1)
    assert right.mean() < 0.75 * left.mean()


@pytest.mark.parametrize(
    ("budget", "kept"), [(["--keep", "5"], 5), (["--ratio", "1"], 144), (["--mean-ratio", "0.5"], 72)]
)
def test_budgets_reach_the_patch(capfd, tmp_path, folder, photo, budget, kept):
    fixed = ["--image", photo, "--question", "x?", "--method", "uniform", "--output", tmp_path / "a.png"]
    assert _run("run", "--model", folder, *fixed, *budget, "--repeats", 1, "--max-new-tokens", 1) == 0
    assert _numbers(capfd.readouterr().out, "visual tokens") == [144, kept]


@pytest.mark.parametrize(("options", "tokens"), [((), [1296, 130]), (("--small",), [144, 14])])
def test_demo_answers_its_question_both_ways(capfd, tmp_path, options, tokens):
    assert _run("demo", *options, "--output", tmp_path / "demo.png", "--repeats", 1) == 0
    out = capfd.readouterr().out
    assert _numbers(out, "visual tokens") == tokens
    truth = re.search(r"The right answer is '(.*)'", out)[1]
    answers = [cell.strip() for cell in next(line for line in out.splitlines() if "answer" in line).split("│")[2:4]]
    assert answers[0] == truth
    assert options or answers[1] == truth
    before, after = _numbers(out, "KV cache")
    assert options or before > 4 * after
    assert Image.open(tmp_path / "demo.png").size[0] > 700


def test_demo_takes_a_picture_and_a_question(capfd, tmp_path, photo):
    arguments = ["--image", photo, "--question", "how many red objects are there?", "--output", tmp_path / "a.png"]
    assert _run("demo", *arguments, "--repeats", 1) == 0
    out = capfd.readouterr().out
    assert "how many red objects are there?" in out and "right answer" not in out


def test_methods_lists_all(capfd):
    from vtprune import methods

    assert _run("methods") == 0
    out = capfd.readouterr().out
    assert methods.names() and all(name in out for name in methods.names())


def test_inspect_prints_the_parts_without_weights(capfd, tmp_path, folder):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    assert _run("inspect", "--model", tmp_path) == 0
    out = capfd.readouterr().out
    assert "LlamaModel" in out and "CLIPVisionModel" in out


@pytest.mark.parametrize("ratio", ["0", "1.5", "many", "-0.1", "nan", ""])
def test_ratio_out_of_range_is_refused(capfd, ratio):
    line = _refused(capfd, "demo", f"--ratio={ratio}")
    assert "--ratio" in line and repr(ratio) in line and "(0, 1]" in line


@pytest.mark.parametrize("arguments", [["--keep=0"], ["--keep=1.5"], ["--repeats=0"], ["--max-new-tokens=x"]])
def test_counts_are_whole_and_positive(capfd, arguments):
    assert "at least 1" in _refused(capfd, "demo", *arguments)


def test_two_budgets_are_refused(capfd):
    assert "not allowed with" in _refused(capfd, "demo", "--ratio", 0.1, "--keep", 5)


@pytest.mark.parametrize("arguments", [[], ["prune"], ["run"], ["demo", "--color"]])
def test_a_wrong_command_line_is_refused(capfd, arguments):
    _refused(capfd, *arguments)


def test_missing_and_unreadable_pictures_are_refused(capfd, tmp_path, photo):
    assert "expected a file" in _refused(capfd, "demo", "--image", tmp_path / "none.png")
    assert "expected a file" in _refused(capfd, "demo", "--image", tmp_path)
    (tmp_path / "text.png").write_text("no picture")
    assert "as a picture" in _refused(capfd, "demo", "--image", tmp_path / "text.png")
    (tmp_path / "half.png").write_bytes(photo.read_bytes()[:3000])
    assert "as a picture" in _refused(capfd, "demo", "--image", tmp_path / "half.png")


def test_an_output_that_cannot_be_written_is_refused_first(capfd, tmp_path):
    assert "folder does not exist" in _refused(capfd, "demo", "--output", tmp_path / "none" / "a.png")
    assert ".png" in _refused(capfd, "demo", "--output", tmp_path / "picture")
    assert ".png" in _refused(capfd, "demo", "--output", tmp_path / "a.txt")


def test_missing_and_empty_model_folders_are_refused(capfd, tmp_path, photo):
    rest = ["--image", photo, "--question", "x?"]
    assert "no folder" in _refused(capfd, "run", "--model", tmp_path / "none", *rest)
    assert "config.json" in _refused(capfd, "run", "--model", tmp_path, *rest)
    (tmp_path / "config.json").write_text("{")
    assert "cannot find the model" in _refused(capfd, "run", "--model", tmp_path, *rest)


def test_a_model_without_weights_or_processor_is_refused(capfd, tmp_path, folder, photo):
    rest = ["--image", photo, "--question", "x?"]
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    assert "cannot load the model" in _refused(capfd, "run", "--model", tmp_path, *rest)
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    _refused(capfd, "run", "--model", tmp_path, *rest)


def test_an_unreachable_hub_name_is_refused(capfd, monkeypatch, photo):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    line = _refused(capfd, "run", "--model", "nobody/nothing", "--image", photo, "--question", "x?")
    assert "nobody/nothing" in line


def test_a_text_only_model_is_refused(capfd, tmp_path, photo):
    from transformers import LlamaConfig

    LlamaConfig(hidden_size=32, num_hidden_layers=2).save_pretrained(tmp_path)
    for command in (["run", "--image", photo, "--question", "x?"], ["inspect"]):
        assert "llama model, which takes no pictures" in _refused(capfd, *command, "--model", tmp_path)


def test_a_model_whose_decoder_cannot_be_found_is_refused(capfd, tmp_path):
    from transformers import Pix2StructConfig

    Pix2StructConfig().save_pretrained(tmp_path)
    line = _refused(capfd, "inspect", "--model", tmp_path)
    assert "Pix2Struct" in line and "decoder" in line


def test_unknown_devices_and_dtypes_are_refused(capfd, folder, photo):
    rest = ["--model", folder, "--image", photo, "--question", "x?"]
    assert "'abacus'" in _refused(capfd, "run", *rest, "--device", "abacus")
    assert "'int8'" in _refused(capfd, "run", *rest, "--dtype", "int8")


def test_cache_bytes_counts_keys_and_values_of_every_layer():
    from transformers import DynamicCache

    cache = DynamicCache()
    cache.update(torch.zeros(1, 2, 5, 4), torch.zeros(1, 2, 5, 4), 0)
    cache.update(torch.zeros(1, 2, 3, 4, dtype=torch.bfloat16), torch.zeros(1, 2, 3, 4, dtype=torch.bfloat16), 1)
    assert cache_bytes(cache) == 2 * 2 * 5 * 4 * 4 + 2 * 2 * 3 * 4 * 2


def test_version_is_that_of_the_installed_package(capfd):
    from importlib.metadata import version

    with pytest.raises(SystemExit) as stop:
        _run("--version")
    assert stop.value.code == 0
    assert capfd.readouterr().out.strip() == f"vtprune {version('vtprune')}"
