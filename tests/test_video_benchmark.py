# SPDX-License-Identifier: Apache-2.0
"""The benchmark of clips: frames under each rule, rows, and tables."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import video
from scripts.docs import tables

PROMPTS = video.prompts


def moving(count: int) -> video.Frames:
    pixels = np.random.default_rng(0).integers(0, 255, (video.SIDE, video.SIDE, 3), dtype=np.uint8)
    return [Image.fromarray(np.roll(pixels, 3 * n, 1)) for n in range(count)]


def test_windows_and_what_is_shown() -> None:
    frames = moving(50)
    cut = list(video.windows(frames, 9))
    assert [len(w) for w in cut] == [video.FRAMES] * 3 and cut[0][0] is frames[0] and cut[-1][-1] is frames[-1]
    clip = cut[0]
    for kept in video.KEPT:
        fewer, smaller = (video.shown(clip, rule, kept) for rule in video.INSTEAD)
        assert len(fewer) % 2 == 0 and len(fewer) // 2 == round(len(clip) // 2 * kept / video.TOKENS)
        assert all(clip.index(b) == clip.index(a) + 1 for a, b in zip(fewer[::2], fewer[1::2], strict=True))
        assert len(smaller) == len(clip) and (smaller[0].width // video.STEP) ** 2 == kept


def test_rows_and_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "METHODS", ("evs", "uniform"))
    monkeypatch.setattr(video, "INSTEAD", {"fewer frames": (126,), "smaller frames": (81,)})
    monkeypatch.setattr(video, "QUESTIONS", video.QUESTIONS[:1])
    monkeypatch.setattr(video, "prompts", lambda part, count, real: _few(part, real))
    measured, one_prompt = [], video.one_prompt

    def once(model, processor, prompt, asked):  # the warm-up has measured the part's only prompt already
        if not measured or measured[-1][0] is not prompt:
            measured.append((prompt, one_prompt(model, processor, prompt, asked)))
        return measured[-1][1]

    monkeypatch.setattr(video, "one_prompt", once)
    data = video.measure(1, tmp_path / "video.json", real=lambda: {"made": moving(16)})
    assert json.loads((tmp_path / "video.json").read_text())["rows"] == data["rows"]
    rows = {(row["part"], row["rule"], row["kept"]): row for row in data["rows"]}
    assert len(rows) == 4 * (2 * 2 + 3 + 3)
    steps = video.FRAMES // 2
    assert rows["made", "uniform", 36]["tokens"] == rows["made", "smaller frames", 36]["tokens"] == 36 * steps
    assert rows["made", "fewer frames", 36]["tokens"] == 288
    assert "first frame whole" in rows["made", "evs", 16]["refused"]
    assert rows["still", "fewer frames", 36]["patches"] == rows["still", "smaller frames", 36]["patches"] == 0.25
    assert rows["still", "uniform", 36]["patches"] == 1 and 0.2 < rows["still", "uniform", 36]["bytes"] < 0.3
    text = tables.clips(tmp_path)
    assert text.count("| `uniform` |") == 2 and text.count("refused") == 1 and text.count("| fewer frames |") == 2
    assert rows["made", "smaller frames", 81]["tokens"] == 81 * steps
    assert rows["made", "fewer frames", 126]["tokens"] == 7 * video.TOKENS and "right" in rows["objects", "uniform", 36]
    assert "| `uniform` | 36 |" in tables.clips_time(tmp_path)
    assert "cut between still scenes with noise" in tables.curvature(tmp_path)
    assert tables.clips(tmp_path / "none") == tables.curvature(tmp_path / "none") == tables.MISSING


def test_methods_beside_what_takes_no_more_time() -> None:
    def row(rule: str, kept: int, *each: tuple[float, float]) -> dict:
        return {"part": "a", "rule": rule, "kept": kept, "each": [list(pair) for pair in each]}

    rows = [
        row("uniform", 36, (0.5, 0.3), (0.6, 0.1), (0.7, 0.2)),
        row("fewer frames", 36, (0.2, 0.5), (0.2, 0.5), (0.2, 0.2)),
        row("fewer frames", 90, (0.6, 0.2), (0.6, 0.1), (0.1, 0.3)),
        row("fewer frames", 108, (0.9, 0), (0.9, 0), (0.9, 0)),
        row("smaller frames", 16, (0.7, 0), (0.7, 0), (0.7, 0)),
        {"part": "b", "rule": "fewer frames", "kept": 108, "each": [[0.1, 0.0]] * 9},
        {"part": "a", "rule": "evs", "kept": 36, "refused": "no"},
    ]
    fewer, smaller = video.equal_time(rows, ["a"])
    assert (fewer["rule"], fewer["time"], fewer["kl"]) == ("uniform", 0.6, pytest.approx(0.2))
    assert (fewer["instead"], fewer["instead_kept"], fewer["instead_time"]) == ("fewer frames", 90, 0.6)
    assert fewer["instead_kl"] == pytest.approx(0.2)
    assert fewer["difference"] == [pytest.approx(-0.1), pytest.approx(0.1)]
    assert smaller["instead"] == "smaller frames" and "instead_kept" not in smaller


def _few(part: str, real: dict) -> list:
    if part in real:
        return [(real[part], "how many objects are there?", None)]
    if part == "objects":
        return PROMPTS(part, 1, real)[:1]
    return [video.drawn_clip(3, 0.0 if part == "still" else 1.5)]
