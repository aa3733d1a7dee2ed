# SPDX-License-Identifier: Apache-2.0
"""Overhead of pruning: the number of operations of a prefill and of a decoding step must not grow."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

import pytest
import torch
from families import FAMILIES, Image
from torch.overrides import TorchFunctionMode

from benchmarks.overhead import OUT, RATIO, count, setting, vtprune
from vtprune.core.registry import resolve
from vtprune.methods import IWP

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


class Projected(TorchFunctionMode):
    """Counts the runs of every linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.runs: Counter[int] = Counter()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.nn.functional.linear:
            self.runs[id(args[1])] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize(
    "method", [IWP(layer=0), IWP(), *map(resolve, ("dart", "fastv", "sparsevlm", "visionzip", "vispruner"))]
)
def test_no_projection_runs_twice(family: str, method: Any) -> None:
    model = FAMILIES[family].build()
    inputs = FAMILIES[family].batch([[3, Image(0), 5], [2, Image(1), 4]])
    weights = {id(m.weight): name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    with torch.no_grad(), vtprune.patch(model, ratio=0.3, method=method), Projected() as projected:
        model(**inputs)
    attend = {name: projected.runs[i] for i, name in weights.items() if re.search(r"\.(q|k|v)_proj|\.qkv", name)}
    assert attend and set(attend.values()) == {1}, {name: runs for name, runs in attend.items() if runs != 1}
