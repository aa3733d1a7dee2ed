# SPDX-License-Identifier: Apache-2.0
"""The benchmark by kind of question: its counts, and resuming."""

from __future__ import annotations

import json

import pytest

import vtprune
from benchmarks import kinds
from vtprune import refvlm
from vtprune.refvlm import evaluate
from vtprune.study import progress


def test_rows_are_the_answers_by_kind_and_runs_go_on(tmp_path, monkeypatch):
    out, ran = tmp_path / "kinds.json", []
    once = kinds.run
    monkeypatch.setattr(kinds, "run", lambda *arguments: ran.append(arguments[3]) or once(*arguments))
    first = kinds.measure(["uniform"], [0.1], 14, out)
    assert ran == [None, "uniform"] and json.loads(out.read_text()) == first
    samples = list(evaluate.held_out_scenes(14))
    model, processor = refvlm.load()
    with vtprune.patch(model, ratio=0.1, method="uniform"):
        given = evaluate.answer(model, processor, samples)
    whole, pruned = (row["kinds"] for row in first["rows"])
    for kind in {sample.kind for sample in samples}:
        pairs = [(s.answer, answer) for s, answer in zip(samples, given, strict=True) if s.kind == kind]
        assert (pruned[kind]["right"], pruned[kind]["total"]) == (sum(a == b for a, b in pairs), len(pairs))
    assert whole["all"]["right"] > pruned["all"]["right"] and whole["all"]["total"] == 14

    again = kinds.measure(["uniform", "random"], [0.1], 14, out)
    assert ran == [None, "uniform", "random"] and again["rows"][:2] == first["rows"]
    out.write_text(json.dumps(first | {"weights_sha256": "another"}))
    with pytest.raises(progress.StaleResultError, match="weights_sha256"):
        kinds.measure([], [], 14, out)
    assert len(kinds.measure([], [], 14, out, force=True)["rows"]) == 1
