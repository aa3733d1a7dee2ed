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
    monkeypatch.setattr(video, "KEPT", (36, 16))
    monkeypatch.setattr(video, "QUESTIONS", video.QUESTIONS[:1])
    monkeypatch.setattr(video, "prompts", lambda part, count, real: _few(part, real))
    data = video.measure(1, tmp_path / "video.json", real=lambda: {"made": moving(16)})
    assert json.loads((tmp_path / "video.json").read_text())["rows"] == data["rows"]
    rows = {(row["part"], row["rule"], row["kept"]): row for row in data["rows"]}
    assert len(rows) == 3 * 4 * 2
    steps = video.FRAMES // 2
    assert rows["made", "uniform", 36]["tokens"] == rows["made", "smaller frames", 36]["tokens"] == 36 * steps
    assert rows["made", "fewer frames", 36]["tokens"] == 288
    assert "first frame whole" in rows["made", "evs", 16]["refused"]
    assert rows["still", "fewer frames", 36]["patches"] == rows["still", "smaller frames", 36]["patches"] == 0.25
    assert rows["still", "uniform", 36]["patches"] == 1 and 0.2 < rows["still", "uniform", 36]["bytes"] < 0.3
    text = tables.clips(tmp_path)
    assert text.count("| `uniform` |") == 2 and text.count("refused") == 1 and "| fewer frames |" in text
    assert "cut between still scenes with noise" in tables.curvature(tmp_path)
    assert tables.clips(tmp_path / "none") == tables.curvature(tmp_path / "none") == tables.MISSING


def _few(part: str, real: dict) -> list:
    if part in real:
        return [(real[part], "how many objects are there?", None)]
    return [video.drawn_clip(3, 0.0 if part == "still" else 1.5)]
