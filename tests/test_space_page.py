# SPDX-License-Identifier: Apache-2.0
"""The page of the Space: parts of the time to the first token, and the speedup that pruning can still reach."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path

import pytest

from vtprune.study.timing import Side

BEFORE = Side("two", 144, 160, 0.2, 0.05, 0.0, 4096, 1)


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parent.parent / "examples" / "space")
    import page

    yield page
    for name in ("page", "answers"):
        sys.modules.pop(name, None)


def test_tower_selection_and_decoder_stand_apart_with_the_bound_left(page) -> None:
    after = dataclasses.replace(BEFORE, visual_tokens=14, seconds=0.1, vision=0.05, selection_time=0.01)
    text = page.results([page.Answer("tiny", "iwp", BEFORE, after)])
    heads = re.findall("<th>(.*?)</th>", text)
    rows = [dict(zip(heads, re.findall("<td.*?>(.*?)</td>", row), strict=True)) for row in text.split("<tr>")[2:]]
    assert [row["of it vision tower"] for row in rows] == ["50.0 ms", "50.0 ms"]
    assert [row["selection"] for row in rows] == ["0.0 ms", "10.0 ms"]
    assert [row["decoder"] for row in rows] == ["150.0 ms", "40.0 ms"]
    assert [row["pruning the decoder further: at most"] for row in rows] == ["4.0 times as fast", "2.0 times as fast"]


def test_without_a_tower_in_the_call_there_is_no_bound(page) -> None:
    row = page.results([page.Answer("tiny", "iwp", BEFORE, dataclasses.replace(BEFORE, vision=0.0))])
    assert "<td></td></tr>" in row and "0.0 ms" in row
