# SPDX-License-Identifier: Apache-2.0
"""The command `vtprune bench`: its files and errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import vtprune
from vtprune import refvlm
from vtprune.cli.main import main


def test_a_result_of_another_version_is_not_overwritten(tmp_path: Path, capfd: Any) -> None:
    out = tmp_path / "a.json"
    command = ["bench", "--model", "tiny", "--visual-tokens", "144", "--methods", "uniform", "--rounds", "1"]
    command += ["--new-tokens", "1", "--text-tokens", "4", "--json", str(out), "--plot", str(tmp_path / "a.svg")]
    pytest.importorskip("matplotlib")
    assert main(command) == 0
    shown = " ".join(capfd.readouterr().out.split())
    assert "of the gain" in shown and "uniform ratio=0.1" in shown and "FLOPs bound" in shown
    data = json.loads(out.read_text())
    assert {"versions", "machine", "device", "threads", "about", "settings", "rows", "rows_in_cpu_time"} <= data.keys()
    assert data["about"]["layers"] == 4 and (tmp_path / "a.svg").read_text().count("uniform ratio=0.1") == 1

    old = data | {"versions": data["versions"] | {"vtprune": "0.0.1"}}
    out.write_text(json.dumps(old))
    assert main(command) == 2
    message = capfd.readouterr().err
    assert f'versions.vtprune is "0.0.1" there and "{vtprune.__version__}" here' in message and "--force" in message
    assert json.loads(out.read_text()) == old
    assert main([*command, "--force"]) == 0
    assert json.loads(out.read_text())["versions"] == data["versions"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--model", "tiny", "--image", "a.png"], "architecture without a processor"),
        (["--model", "embedded", "--image", "a.png", "--visual-tokens", "9"], "leave --visual-tokens out"),
        (["--model", "nowhere"], "no folder nowhere: expected"),
        (["--model", "lava-1.5-7b"], "or one of embedded, embedded-qwen2_5_vl, llava-1.5-7b, "),
        (["--model", "tiny", "--clip"], "takes the frames of a clip as pictures"),
        (["--model", "embedded-qwen2_5_vl", "--clip"], "--clip needs --image FOLDER"),
        (["--json", "/nowhere/a.json"], "its folder does not exist"),
        (["--plot", "a.txt"], "expected a file name that ends in .svg"),
        (["--dtype", "int8"], "unknown dtype 'int8'"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(given: list[str], words: str, capfd: Any) -> None:
    assert main(["bench", *given]) == 2
    assert words in capfd.readouterr().err


def test_a_model_with_a_processor_is_measured(tmp_path: Path, capfd: Any) -> None:
    out = tmp_path / "a.json"
    given = ["bench", "--model", "embedded", "--methods", "uniform", "--rounds", "1", "--new-tokens", "1"]
    assert main([*given, "--visual-tokens", "144", "--batch", "1", "2", "--json", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert {(row["batch"], row["visual"]) for row in rows if "refused" not in row} == {(1, 144), (2, 144)}


def test_a_clip_is_measured_beside_smaller_frames(tmp_path: Path) -> None:
    out = tmp_path / "a.json"
    for number, frame in enumerate(refvlm.clips.clip(0, (12, 12), 3).frames):
        frame.save(tmp_path / f"{number}.png")
    given = ["bench", "--model", "embedded-qwen2_5_vl", "--methods", "vidcom2", "--rounds", "1", "--new-tokens", "1"]
    given += ["--clip", "--image", str(tmp_path), "--ratios", "0.3", "--batch", "2", "--question", "what moves?"]
    assert main([*given, "--json", str(out)]) == 0
    data = json.loads(out.read_text())
    rows = {row["variant"]: row for row in data["rows"]}
    assert data["clip"] and all(row["visual"] == 432 for row in rows.values())
    counts = {row["kept"] for name, row in rows.items() if name != "unpruned"}
    assert counts == {108}, "three steps of 6 x 6 tokens, the most below 0.3 of 12 x 12"
