# SPDX-License-Identifier: Apache-2.0
"""Pruning costs next to nothing: what it does in a prefill and in a decoding step does not grow unnoticed."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from benchmarks.overhead import OUT, RATIO, count, setting, vtprune

ROWS: dict[str, dict[str, Any]] = {
    row["variant"]: row for row in json.loads(OUT.read_text())["rows"] if row["setting"] == "built-in"
}
AIMS = {"random": 1.25, "iwp": 1.8}  # tensor operations of a prefill, as a share of the unpruned one's


@pytest.fixture(scope="module")
def counts() -> dict[str, dict[str, dict[str, int]]]:
    where, found = setting("built-in"), {}
    length = where.inputs["input_ids"].shape[1]
    for method in ("unpruned", *AIMS):
        with torch.no_grad(), vtprune.patch(where.model, ratio=RATIO, method="random") as patch:
            if method == "unpruned":
                patch.remove()
            elif method != "random":
                patch = vtprune.patch(where.model, ratio=RATIO, method=method)
            where.prefill()
            step = where.step(where.prefill(), length)
            step()
            found[method] = {"prefill": vars(count(where.prefill)), "step": vars(count(step))}
            patch.remove()
    return found


@pytest.mark.parametrize("method", AIMS)
def test_counts_rise_by_no_more_than_a_twentieth(counts: dict, method: str) -> None:
    for part in ("prefill", "step"):
        for what, known in ROWS[method][part].items():
            base = ROWS["unpruned"][part][what]
            now, own = counts[method][part][what], counts["unpruned"][part][what]
            # What the model itself does differs between versions of transformers; what pruning adds to it does not.
            assert now - own <= known - base + 0.05 * known, (part, what)


@pytest.mark.parametrize("method", AIMS)
def test_a_prefill_makes_few_operations_more_and_a_step_none(counts: dict, method: str) -> None:
    mine, unpruned = counts[method], counts["unpruned"]
    assert mine["prefill"]["operations"] <= AIMS[method] * unpruned["prefill"]["operations"]
    for what in ("operations", "reads", "allocations"):
        assert mine["step"][what] == unpruned["step"][what], what
