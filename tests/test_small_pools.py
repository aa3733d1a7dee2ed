# SPDX-License-Identifier: Apache-2.0
"""The kernels' rule for all pairs at once or lazy evaluation agrees with the measured crossover."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.small_pools import OUT, cases, of_taken, same

ROWS: list[dict[str, Any]] = json.loads(OUT.read_text())["rows"]


def test_the_rule_takes_the_faster_path() -> None:
    for operation in {row["operation"] for row in ROWS}:
        mine = [row for row in ROWS if row["operation"] == operation]
        assert sum(map(of_taken, mine)) < 1.1 * sum(min(row["lazy"], row["pairs"]) for row in mine)


def test_both_paths_choose_the_same_and_the_result_is_of_this_rule() -> None:
    assert all(row["equal"] for row in ROWS)
    recorded = {(r["operation"], r["rows"], r["width"], r["picks"]): r["small"] for r in ROWS}
    for rows, picks in ((144, 7), (256, 26)):
        for name, width, small, lazy, pairs in cases(rows, picks, "clustered"):
            assert recorded[name, rows, width, picks] == small
            assert same(name, lazy(), pairs())
