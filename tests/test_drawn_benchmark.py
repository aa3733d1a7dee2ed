# SPDX-License-Identifier: Apache-2.0
"""The benchmark of pages and crowds: equal token counts, lost and rescued answers, and the table."""

from __future__ import annotations

import pytest

from benchmarks import drawn, report_sections
from vtprune import refvlm
from vtprune.refvlm import beds


def test_rows_keep_as_many_tokens_as_the_smaller_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawn, "METHODS", ("random", "resprune"))
    monkeypatch.setattr(drawn, "RATIOS", (0.5, 0.1))
    loaded = refvlm.load(name="qwen2_5_vl")
    rows = drawn.ask(*loaded, beds.samples("pages 12 x 12", 1)[0])
    assert rows["unpruned"]["tokens"] == 144 and rows["unpruned"]["cost"] == 1
    for ratio in (0.5, 0.1):
        count = rows[f"resize {ratio}"]["tokens"]
        assert 0.6 * ratio * 144 <= count <= ratio * 144
        assert rows[f"random {ratio}"]["tokens"] == rows[f"resprune {ratio}"]["tokens"] == count
        assert rows[f"resize {ratio}"]["cost"] < rows[f"random {ratio}"]["cost"] < 1


def test_summary_counts_what_resizing_loses() -> None:
    def record(whole: bool, small: bool, mine: bool) -> dict:
        made = {"unpruned": (whole, 144, 1.0), "resize 0.5": (small, 64, 0.4), "mine 0.5": (mine, 64, 0.7)}
        return {name: dict(zip(("right", "tokens", "cost"), row, strict=True)) for name, row in made.items()}

    records = [
        record(True, False, True),
        record(True, False, False),
        record(False, False, True),
        record(True, True, False),
    ]
    unpruned, small, mine = drawn.summary(records)
    assert (unpruned["right"], small["right"], mine["right"]) == (3, 1, 2)
    assert (mine["lost"], mine["rescued"]) == (2, 1) and "lost" not in small and "lost" not in unpruned
    assert mine["answers"] == "1010" and mine["tokens"] == 64
    data = {
        "model": "m",
        "questions": "4 questions",
        "versions": {},
        "beds": {"pages 12 x 12": [unpruned, small, mine]},
    }
    text = report_sections.drawn(data)
    assert "| `mine 0.5` | 64 | 0.70 | 50.0 %" in text and "| 1 of 2 |" in text
