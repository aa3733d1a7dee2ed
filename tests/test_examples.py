# SPDX-License-Identifier: Apache-2.0
"""Every example runs on the built-in model and prints the documented results."""

from __future__ import annotations

import importlib
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "examples"


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs an example as `python examples/NAME ARGUMENTS` would, without a new process; returns what it printed."""
    importlib.import_module("vtprune.methods")  # registers the methods, which happens once in a process
    registry = importlib.import_module("vtprune.core.registry")
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))

    def run(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(FOLDER / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_all_are_listed_and_tested():
    names = sorted(path.name for path in FOLDER.glob("[0-9]*.py"))
    listed = re.findall(r"^\| \[([\w.]+)\]\(\1\)", (FOLDER / "README.md").read_text(encoding="utf-8"), re.M)
    tested = re.findall(r"\"(\d\d_\w+\.py)\"", Path(__file__).read_text(encoding="utf-8"))
    assert names == listed == sorted(set(tested)) and len(names) == 6


def test_the_certificate_of_the_space_is_of_the_model_in_the_package():
    import vtprune
    from vtprune import refvlm

    certificate = vtprune.Certificate.load(FOLDER / "space" / "certificate.json")
    certificate.check_model(refvlm.load(name="qwen2_5_vl")[0])
    assert certificate.ratio < 1 and certificate.make_method().name == certificate.method


def test_one_liner_in_a_process_of_its_own():
    command = [sys.executable, str(FOLDER / "01_one_liner.py")]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300).stdout
    question = re.search(r"unpruned: (\d), pruned: \d, right: (\d)", out)
    assert question and question[1] == question[2]
    assert "144 -> 14" in out


def test_compare_methods(run):
    out = run("02_compare_methods.py", "--questions", "4", "--methods", "pooling", "--mean-ratio", "0.1")
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines()[2:]}
    assert set(rows) == {"unpruned", "pooling", "random", "uniform"}
    assert rows["unpruned"][:2] == ["144", "0.0000"] and rows["random"][0] == "14"
    assert all(float(row[1]) > 0 for name, row in rows.items() if name != "unpruned")
    assert all(0 <= int(row[2]) <= 4 for row in rows.values()) and int(rows["unpruned"][2]) >= 3


def test_own_method(run):
    out = run("03_own_method.py")
    right = {name: int(count) for name, count in re.findall(r"^(\w+): (\d+) of 16 right with 9.7%", out, re.M)}
    assert right.keys() == {"unusual", "random"} and right["unusual"] >= 8
    source = (FOLDER / "03_own_method.py").read_text(encoding="utf-8")
    lines = source.split("# --- the ten lines\n")[1].split("# --- end")[0].splitlines()
    assert len([line for line in lines if line.strip()]) <= 10


@pytest.mark.parametrize("arguments", [(), ("--pan", "0", "--method", "divprune")])
def test_video(run, arguments):
    """Both trained models read the sign, unpruned and pruned."""
    out = run("04_video.py", *arguments)
    answers = re.findall(
        r"^(frames as pictures|video input): .*\? unpruned: (\w+), pruned: (\w+), right: (\w+)", out, re.M
    )
    assert [answer[0] for answer in answers] == ["frames as pictures", "video input"]
    assert {word for answer in answers for word in answer[1:]} == {"5"}
    rows = re.findall(r"(\d+) -> (\d+) visual tokens, per (?:two )?frames? \[([\d, ]+)\]", out)
    assert [row[:2] for row in rows] == [("576", "58"), ("288", "29")]
    kept = [[int(count) for count in row[2].split(",")] for row in rows]
    assert [(len(frames), sum(frames)) for frames in kept] == [(4, 58), (2, 29)]


def test_a_clip_of_pairs_of_equal_frames_is_the_pictures_themselves():
    """In the video input, two equal frames have the patches of one picture, and two frames keep their own pixels."""
    import torch

    from vtprune import refvlm
    from vtprune.refvlm import clip_inputs

    model, processor = refvlm.load(name="qwen2_5_vl")
    pictures = [refvlm.scenes.scene(seed).image for seed in (1, 2)]
    single = processor.image_processor(images=pictures, return_tensors="pt")
    frames = [pictures[0], pictures[0], pictures[1], pictures[1]]
    video = clip_inputs.inputs(model, processor, frames, " what? answer:")
    assert torch.equal(video["pixel_values_videos"], single["pixel_values"])
    mixed = clip_inputs.inputs(model, processor, [pictures[0], pictures[1]], " what? answer:")["pixel_values_videos"]
    first, second = (part.view(-1, 3, 2, 36) for part in single["pixel_values"].chunk(2))
    mixed = mixed.view(-1, 3, 2, 36)
    assert torch.equal(mixed[:, :, 0], first[:, :, 0]) and torch.equal(mixed[:, :, 1], second[:, :, 1])


def test_clip_with_a_method_for_clips_and_its_strip(run, tmp_path):
    from PIL import Image

    strip = tmp_path / "clip.png"
    options = ("--video-method", "vcast", "--frames", "16", "--ratio", "0.25", "--strip", str(strip))
    out = run("04_video.py", *options)
    counts = re.search(r"1152 -> 288 visual tokens, per two frames \[([\d, ]+)\]", out)[1].split(",")
    assert len(counts) == 8 and min(map(int, counts)) >= 1
    assert Image.open(strip).width > 1000


def test_batch_server(run):
    out = run("05_batch_pipeline.py")
    requests, calls, right = map(int, re.search(r"(\d+) requests in (\d+) calls .* (\d+) answered right", out).groups())
    assert requests == 12 and calls < 12 and right >= 10
    before, after = map(int, re.search(r"last call: (\d+) -> (\d+)", out).groups())
    assert before % 144 == 0 and after == before // 144 * 14


def test_batch_server_refuses_what_is_no_picture():
    import json
    import threading
    import urllib.error
    import urllib.request

    example = runpy.run_path(str(FOLDER / "05_batch_pipeline.py"))
    batcher = example["Batcher"](lambda chats, **_: [[{"generated_text": " fine"}] for _ in chats])
    server = example["serve"](batcher, 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    try:
        for body in (b"", b"{", b'{"question": "x"}', b'{"question": "x", "image": "AAAA"}', b"[1]"):
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(urllib.request.Request(url, body, method="POST"))
            assert refused.value.code == 400 and "error" in json.load(refused.value)
        from PIL import Image

        assert example["post"](url, Image.new("RGB", (9, 9)), "still there?") == "fine"
    finally:
        server.shutdown()
        server.server_close()


def test_the_batch_job_names_the_packages_that_it_lacks(run, tmp_path, monkeypatch):
    from PIL import Image

    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    monkeypatch.setitem(sys.modules, "ray", None)
    arguments = ["--model", "x", "--images", str(tmp_path), "--question", "?", "--out", str(tmp_path / "answers")]
    with pytest.raises(SystemExit, match=r"pip install \"ray\[data,serve\]\""):
        run("ray_batch.py", *arguments)


def test_tune_on_own_images(run, tmp_path):
    from vtprune import refvlm

    pytest.importorskip("optuna", reason="the search needs optuna and scipy")
    (tmp_path / "pictures").mkdir()
    for seed in (1, 2):
        refvlm.scenes.scene(seed).image.save(tmp_path / "pictures" / f"{seed}.png")
    out = run(
        "06_tune_on_own_images.py",
        "--images",
        str(tmp_path / "pictures"),
        "--out",
        str(tmp_path / "s.json"),
        "--trials",
        "2",
    )
    first, best = map(float, re.search(r"state: ([\d.]+) as released, ([\d.]+) with", out).groups())
    assert 0 < first <= best <= 1 and (tmp_path / "s.json").exists()
    assert 0.19 < float(re.search(r"s.json: mean ratio ([\d.]+)", out)[1]) <= 0.2
