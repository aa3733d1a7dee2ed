# SPDX-License-Identifier: Apache-2.0
"""The documentation's statements about the default method at equal mean cost, against the committed results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import equal_cost
from benchmarks.equal_cost import better, comparisons, lead


def counts(right: int, total: int = 200) -> dict[str, int]:
    return {"right": right, "total": total}


def test_leads_of_counts_and_of_paired_outcomes() -> None:
    assert lead(counts(180), counts(120))[3] > 0 and lead(counts(120), counts(180))[4] < 0
    _, _, _, low, high = lead(counts(150), counts(148))
    assert low < 0 < high and high - low == pytest.approx(0.17, abs=0.01)
    ones, paired = "1" * 60, "1" * 54 + "0" * 6
    assert lead({"outcomes": ones + "0" * 40}, {"outcomes": paired + "0" * 40})[3] > 0
    assert lead(counts(60, 100), counts(54, 100))[3] < 0  # the same shares, not paired
    assert lead({"outcomes": "1111"}, {"outcomes": "11"})[:3] == (1.0, 1.0, 2)  # over the questions of both


def write(folder: Path, **right: int) -> None:
    rows = [counts(n) | {"method": name, "ratio": 0.1, "mean_tokens": 14.0} for name, n in right.items()]
    rows.append(counts(200) | {"method": "late", "ratio": 0.1, "mean_tokens": 80.0})
    rows.append({"method": "never", "ratio": 0.1, "refused": "no"})
    data = {"model": "llava", "unpruned": {"visual_tokens": 144}, "rows": rows}
    (folder / "accuracy.json").write_text(json.dumps(data))


def test_only_rows_of_equal_cost_compare(tmp_path: Path) -> None:
    write(tmp_path, **{equal_cost.NAME: 150, "good": 180, "bad": 100})
    found = comparisons(tmp_path)
    assert [one.method for one in found] == ["bad", "good"]
    assert [one.method for one in better(found)] == ["good"]


def test_no_method_is_clearly_better_than_the_default_where_the_page_says_none() -> None:
    """Only the methods in `EXCEPTIONS`, which docs/choosing.md names, are better than the default."""
    found = comparisons()
    assert len({one.bed for one in found}) >= 4
    assert {(one.bed, round(one.cost, 2), one.method) for one in better(found)} == set(EXCEPTIONS)


_QWEN = "scenes, built-in qwen2_5_vl"
_TEXTS = "texts of 1,024 places, real decoder"
_DIVERSE = ("cdpruner", "divprune", "zoo_prune")
EXCEPTIONS = ((_QWEN, 0.4, "sparsevlm"), *((_TEXTS, 0.57, method) for method in _DIVERSE))


def test_what_pages_say_of_long_texts() -> None:
    """docs/choosing.md says that at 0.15 the default answers more than twice as many as those better at 0.57."""
    rows = json.loads((equal_cost.RESULTS / "needle.json").read_text())["1024"]
    assert rows["resprune 0.15"]["right"] > 2 * max(rows[f"{method} 0.15"]["right"] for method in _DIVERSE)


def test_texts_that_chose_the_default_are_answered_like_the_others() -> None:
    """docs/choosing.md says that the shares differ by at most two percentage points at every cost."""
    rows = json.loads((equal_cost.RESULTS / "needle.json").read_text())["256"]
    for outcomes in (rows[f"resprune {cost}"]["outcomes"] for cost in (0.57, 0.3, 0.15)):
        chosen, others = outcomes[:40], outcomes[40:]
        assert len(others) == 160
        assert abs(chosen.count("1") / 40 - others.count("1") / 160) <= 0.02
